"""What a caller may ask of decoding: how to choose tokens, and which may come next."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax

PAD_ID = 0
START_ID = 0  # a T5 decoder starts from the padding token
EOS_ID = 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy).
      top_k: keep the ``k`` most probable tokens; 0 keeps all.
      top_p: keep the most probable tokens, with mass at least ``p``; 1 keeps all.
      min_p: keep tokens so probable relative to the most probable one; 0 keeps all.
      typical_p: keep the tokens whose information is closest to the entropy, with
        mass at least ``p``; 1 keeps all.
      repetition_penalty: above 1 makes tokens of the response so far less probable,
        as Hugging Face defines it; 1 is off.
      length_penalty: ``(start, factor)``: after ``start`` tokens EOS's logit rises by
        its size times ``factor ** (tokens - start) - 1`` (Hugging Face's
        ``exponential_decay_length_penalty``); None is off.
      bad_words: sequences of token ids that are never completed.
      stop_sequences: sequences of token ids that end a response, besides EOS; they
        stay part of it.
      min_new_tokens: no EOS before so many tokens.
      eos_id: the token that ends a response, the vocabulary's.

    >>> Sampling(temperature=0.7, top_p=0.9).top_p
    0.9
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: tuple[int, float] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    eos_id: int = EOS_ID

    def __post_init__(self):
        def check(name: str, fits: bool, what: str) -> None:
            if not fits:
                raise ValueError(f"{name} must {what}, got {getattr(self, name)!r}.")

        # Smaller temperatures divide float32 logits into infinities.
        t, k, penalty = self.temperature, self.top_k, self.repetition_penalty
        fits = t == 0.0 or 1e-6 <= t < math.inf
        check("temperature", fits, "be 0 (greedy) or finite and >= 1e-6")
        check("top_k", k == int(k) and k >= 0, "be an integer >= 0 (0: off)")
        check("top_p", 0.0 < self.top_p <= 1.0, "lie in (0, 1] (1: off)")
        check("typical_p", 0.0 < self.typical_p <= 1.0, "lie in (0, 1] (1: off)")
        check("min_p", 0.0 <= self.min_p <= 1.0, "lie in [0, 1] (0: off)")
        check("repetition_penalty", 0.0 < penalty < math.inf, "be positive (1: off)")
        check("min_new_tokens", self.min_new_tokens >= 0, "be >= 0")
        if self.length_penalty is not None:
            start, f = self.length_penalty
            check("length_penalty", start >= 0 and f > 0, "be (start >= 0, factor > 0)")
            object.__setattr__(self, "length_penalty", (int(start), float(f)))
        for name in ("bad_words", "stop_sequences"):
            # Lists, as gin and JSON give them, must not make the rules unhashable.
            sequences = tuple(tuple(map(int, s)) for s in getattr(self, name))
            if () in sequences:
                raise ValueError(f"{name} holds an empty sequence of token ids.")
            object.__setattr__(self, name, sequences)
        if (self.eos_id,) in self.bad_words:
            raise ValueError(
                f"bad_words forbids EOS ({self.eos_id}): no response could end. Use "
                "min_new_tokens to make responses longer."
            )


class Constraint(Protocol):
    """Which tokens may come next: a pytree whose leaves are its tables.

    States are pytrees with one entry a row, of any leading shape ``[...]``.
    """

    def start(self) -> Any:
        """The state of one row before its first token; arrays without row axes."""

    def allowed(self, state: Any, remaining: jax.Array) -> jax.Array:
        """Bool ``[..., V]``: tokens that may come next. All False ends the row.

        ``remaining``, int32 ``[...]``, tokens may still come, EOS included.
        """

    def advance(self, state: Any, tokens: jax.Array) -> Any:
        """The states after ``tokens`` int32 ``[...]``."""
