"""Soft prompts: learned rows that stand before every prompt (Lester et al. 2104.08691).

The rows ``token_embedder/soft_prompt [length, E]`` are no tokens: data, batches and
feature lengths know nothing of them. Networks put them before each prompt of a row as
they embed it, so that every packed prompt has its own, at the distances that it would
have alone. Their states follow those of the row's tokens, ``[B, Le + P * length, E]``
with room for ``P`` prompts, and a response attends to those of its prompt too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import user_code
from jaxalign.batch import Batch
from jaxalign.models.adapted import SOFT_PROMPT, Tree
from jaxalign.models.layers import Embed

STARTS = ("vocabulary", "uniform")
COMMON = 5000  # Lester et al.; SentencePiece's ids are in the order of frequency
_AXIS = "prompt"  # the logical axis of the rows


@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """Rows of embeddings before every prompt, which train in place of the network.

    They cannot be merged: where the network goes, they go beside it. Training does not
    start at the base network, whose prompts have nothing before them.

    Attributes:
      length: how many rows.
      start: what they are at first. ``"vocabulary"``: the embeddings of ids drawn from
        the first 5,000; ``"uniform"``: numbers between -0.5 and 0.5; a sequence of
        ids, such as an instruction's: their embeddings, repeated to the length.

    >>> import numpy
    >>> base = {"token_embedder": {"embedding": numpy.eye(4)}}
    >>> own = SoftPrompt(length=3, start=[2, 1]).init(jax.random.key(0), base)
    >>> own["token_embedder"]["soft_prompt"].argmax(-1).tolist()
    [2, 1, 2]
    """

    length: int = 20
    start: str | Sequence[int] = "vocabulary"

    adds: ClassVar[str] = "rows before every prompt"
    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole = isinstance(self.length, int) and not isinstance(self.length, bool)
        if not whole or self.length < 1:
            raise ValueError(
                f"SoftPrompt.length must be a whole number of at least 1, got "
                f"{self.length!r}."
            )
        if isinstance(self.start, str):
            if self.start not in STARTS:
                raise ValueError(
                    f"SoftPrompt.start must be one of {STARTS} or a sequence of ids, "
                    f"got {self.start!r}.{user_code.hint(self.start, STARTS)}"
                )
            return
        ids = tuple(self.start) if isinstance(self.start, Sequence) else ()
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(
                f"SoftPrompt.start must be one of {STARTS} or a sequence of ids, got "
                f"{self.start!r}."
            )
        object.__setattr__(self, "start", ids)

    def init(self, key: jax.Array, base: Tree) -> Tree:
        """The rows, for a network's parameters."""
        self.check(base)
        table = _table(base)
        size, width = table.shape
        if self.start == "uniform":
            rows = jax.random.uniform(
                key, (self.length, width), minval=-0.5, maxval=0.5
            )
            return _placed(rows)
        if self.start == "vocabulary":
            common = min(COMMON, size)
            again = self.length > common
            ids = jax.random.choice(key, common, (self.length,), replace=again)
        else:
            ids = jnp.resize(jnp.array(self.start), self.length)
        return _placed(jnp.take(jnp.asarray(table), ids, axis=0))

    def check(self, base: Tree) -> None:
        """Refuses a network's parameters, or their shapes, that have no such rows."""
        size = _table(base).shape[0]
        if not isinstance(self.start, str) and max(self.start) >= size:
            raise ValueError(
                f"SoftPrompt.start has the id {max(self.start)}, but the network has "
                f"embeddings of the ids 0 to {size - 1}."
            )

    def axes(self, base: Tree) -> Tree:
        """Logical axes of the rows, given those of the network's parameters."""
        return _placed((_AXIS, _table(base)[1]))

    def expand(self, tree: Tree, *, training: bool = False) -> Tree:
        """What layers read: the parameters as they are."""
        del training
        return tree


def _table(base: Mapping[str, Any]) -> Any:
    try:
        return base["token_embedder"]["embedding"]
    except KeyError:
        raise ValueError(
            "A soft prompt stands before the tokens of a network with "
            f"token_embedder/embedding; this one has {sorted(base)}."
        ) from None


def _placed(rows: Any) -> Tree:
    return {"token_embedder": {SOFT_PROMPT: rows}}


def held(params: Mapping[str, Any]) -> bool:
    """Whether a network's parameters have a soft prompt beside them."""
    return SOFT_PROMPT in params.get("token_embedder", {})


def refuse_start(path: Any, params: Mapping[str, Any]) -> None:
    """Refuses parameters with a soft prompt to a run that would start from them."""
    if held(params):
        raise ValueError(
            f"{path} is a network with a soft prompt, which cannot be merged, and no "
            "run starts from one: start from the network that it was trained on, or "
            "go on with its own run, the same --run_dir and more --steps."
        )


def settings(params: Mapping[str, Any], batch: Batch) -> dict[str, int]:
    """What ``encode`` is told of a batch: with a soft prompt, how many prompts a row
    has room for."""
    return {"prompts": batch["prompt_mask"].shape[1]} if held(params) else {}


def encode(
    embed: Embed,
    encoder: Callable[[jax.Array, jax.Array, bool], jax.Array],
    tokens: jax.Array,
    segment_ids: jax.Array,
    prompts: int | None,
    deterministic: bool = True,
) -> jax.Array:
    """States of packed prompts, each after the soft prompt if there is one.

    Args:
      embed: of the tokens.
      encoder: takes embeddings, segments and `deterministic`.
      tokens: ``[B, Le]``.
      segment_ids: ``[B, Le]``.
      prompts: the room ``P``; it may be None where there is no soft prompt.
      deterministic: no dropout.

    Returns:
      ``[B, Le, E]``, of the tokens where they stand; with a soft prompt of ``n`` rows
      ``[B, Le + P * n, E]``, then of its rows before the first prompt, the second ...
    """
    rows = embed.prompt()
    if rows is None:
        return encoder(embed(tokens), segment_ids, deterministic)
    if prompts is None:
        raise ValueError(
            "A network with a soft prompt has to be told how many prompts a row has "
            "room for: call jaxalign.models.encode(model, params, batch), or pass "
            'encode(..., prompts=batch["prompt_mask"].shape[1]).'
        )
    before = jnp.tile(rows, (prompts, 1))
    before = jnp.broadcast_to(before, (len(tokens), *before.shape))
    embedded = jnp.concatenate([embed(tokens), before], axis=1)
    whose = _with_rows(segment_ids, prompts, len(rows))
    # T5 knows distances within a segment only, and the encoder as it is serves a row
    # in which each prompt comes after its own rows, and padding last.
    token = jnp.arange(whose.shape[1]) < tokens.shape[1]
    key = jnp.where(whose == 0, 2 * prompts + 2, 2 * whose + token)
    order = jnp.argsort(key, axis=1, stable=True)
    states = encoder(_moved(embedded, order), _moved(whose, order), deterministic)
    return _moved(states, jnp.argsort(order, axis=1))


def segments(embed: Embed, segment_ids: jax.Array, length: int) -> jax.Array:
    """The segments ``[B, length]`` of what `encode` returns, given the tokens'.

    Raises:
      ValueError: for a length that `encode` does not return.
    """
    rows = embed.prompt()
    if rows is None:
        return segment_ids
    more = length - segment_ids.shape[1]
    if more <= 0 or more % len(rows):
        raise ValueError(
            f"Expected the states of {segment_ids.shape[1]} tokens and of {len(rows)} "
            f"rows of a soft prompt for each prompt, got {length} states: they were "
            "encoded with other parameters."
        )
    return _with_rows(segment_ids, more // len(rows), len(rows))


def _with_rows(segment_ids: jax.Array, prompts: int, length: int) -> jax.Array:
    own = jnp.repeat(jnp.arange(1, prompts + 1, dtype=segment_ids.dtype), length)
    own = jnp.broadcast_to(own, (len(segment_ids), *own.shape))
    return jnp.concatenate([segment_ids, own], axis=1)


def _moved(x: jax.Array, order: jax.Array) -> jax.Array:
    """``x[b, order[b]]`` of a permutation, which says so for the gradient's sake."""

    def row(x: jax.Array, order: jax.Array) -> jax.Array:
        return x.at[order].get(mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(row)(x, order)
