"""`jaxalign steer`: responses under constraints and rewards, with their evidence."""

from __future__ import annotations

import functools
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from tqdm import tqdm

from jaxalign import judges
from jaxalign.cluster import exclusive
from jaxalign.data.bad_rows import quoted, show
from jaxalign.decoding import constraints, programs
from jaxalign.decoding.checks import check_constraint
from jaxalign.decoding.generator import prompt_bucket
from jaxalign.decoding.smc import smc
from jaxalign.inference import generation, outputs
from jaxalign.inference.evaluation import write_jsonl
from jaxalign.training import checkpoints

_log = logging.getLogger(__name__)

BLANK = "[BLANK]"
# Log-potentials: sums of a few are still float32.
_LARGEST = float(np.finfo(np.float32).max) / 1024
_FIELDS = ("regex", "include", "template", "more_prompts")


class _Wish(NamedTuple):
    """What a row asks for; rows that ask for the same are steered together."""

    regex: str | None
    include: tuple[str, ...]
    template: str | None
    contexts: int


@exclusive.one_output_at_a_time
def steer(
    *,
    checkpoint: str,
    prompts: str,
    output: str,
    regex: str | None = None,
    include: Sequence[str] = (),
    template: str | None = None,
    potential: str | None = None,
    beta: float = 1.0,
    num_particles: int = 16,
    expansion: int = 3,
    resampling: str = "fearnhead_clifford",
    ess_threshold: float = 0.5,
    merge: bool = False,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
) -> int:
    """Samples responses from the model conditioned on what they have to be.

    A row's own ``regex``, ``include`` or ``template`` replaces the argument, and its
    ``more_prompts``, a list, asks for text that continues those as well: the product of
    the model's distributions given each.

    Args:
      checkpoint: a run directory or one of its checkpoints.
      prompts: a JSON Lines file, rows with a ``prompt``.
      output: a JSON Lines file: each row as it was read, once per surviving particle,
        heaviest first, with ``response``, ``particle``, ``weight`` (they sum to 1),
        ``logp`` (under the tempered model), ``num_tokens``, ``log_evidence`` and
        ``min_ess``. A row whose particles all died has one line with a null response.
      regex: the whole response has to match it.
      include: phrases that it has to hold.
      template: text with ``[BLANK]`` in it, each to be filled; excludes the two above.
      potential: a scoring judge, such as ``"package.module:function"`` (see
        `jaxalign.judges`), asked about every response; the target is the model times
        ``exp(score / beta)``. ``-inf`` forbids a response; NaN, ``inf``, None and what
        float32 does not hold are an error.
      beta: see ``potential``.
      num_particles: ``N``.
      expansion: children of a particle at each step, ``K``.
      resampling: see ``jaxalign.decoding.smc``.
      ess_threshold: see there.
      merge: see there.
      temperature: of the model that is conditioned.
      max_new_tokens: of a response, EOS included; it has to end within them.
      batch_size: prompts at a time.
      seed: of the samples.
      field_map: our field names to the file's.
      on_bad_row: ``"error"`` or ``"skip"``.

    Returns:
      The number of lines in the file.

    Raises:
      ValueError: naming the row or the argument; or when a finished output was made
        with other settings.
    """
    asked = {k: v for k, v in locals().items() if k not in ("output", "batch_size")}
    scorer = judges.resolve(potential) if potential else None
    asked |= {
        "verb": "steer",
        "prompts": outputs.input_key(prompts),
        "potential": scorer.fingerprint if scorer else None,
    }
    count = outputs.kept(output, asked, checkpoint=checkpoint)
    if count >= 0:
        return count
    policy = checkpoints.newest(checkpoint)
    template_of_chats = policy.meta.get("chat_template")
    rows = generation.read_rows(
        prompts, "prompts", output, field_map, on_bad_row, template_of_chats
    )
    default = {"regex": regex, "include": tuple(include), "template": template}
    wishes = [_wish(i, raw, default) for i, (raw, _) in enumerate(rows)]
    judge = None
    if scorer:
        judge = _Judge(potential, scorer, beta, [r["prompt"] for _, r in rows])
    program_of = functools.cache(
        lambda wish: _program(wish, judge, policy, max_new_tokens)
    )
    groups: dict[_Wish, list[int]] = {}
    for i, wish in enumerate(wishes):
        try:
            program_of(wish)  # mistakes come before anything is computed
        except ValueError as error:
            raise ValueError(f"Row {i}: {error}") from error
        groups.setdefault(wish, []).append(i)

    sample = functools.partial(
        smc,
        policy.model,
        policy.params,
        key=jax.random.key(seed),
        num_particles=num_particles,
        expansion=expansion,
        resampling=resampling,
        ess_threshold=ess_threshold,
        merge=merge,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        vocab_size=policy.vocabulary.vocab_size,
        eos_id=policy.vocabulary.eos_id,
    )
    found: dict[int, list[dict[str, Any]]] = {}
    with tqdm(total=len(rows), desc="steer", unit="prompt", disable=None) as bar:
        for wish, members in groups.items():
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                tokens = _encoder_tokens(batch, rows, batch_size, policy.vocabulary)
                ids = np.resize(batch, batch_size)
                particles = jax.device_get(
                    sample(tokens, program_of(wish), prompt_ids=ids)
                )
                if judge:
                    judge.check()
                for at, i in enumerate(batch):
                    found[i] = _lines(particles, at, policy.vocabulary)
                bar.update(len(batch))
    dead = sum(lines[0]["response"] is None for lines in found.values())
    if dead:
        forbidden = ""
        if judge and judge.forbidden:
            forbidden = f" ({judge.forbidden} responses had a potential of -inf)"
        _log.warning(
            f"No particle of {dead} of {len(rows)} prompts survived{forbidden}; more "
            "particles, a larger expansion or more new tokens may help."
        )

    def lines() -> Iterable[dict[str, Any]]:
        for i, (raw, _) in enumerate(rows):
            yield from ({**raw, **line} for line in found[i])

    asked["checkpoint"] = policy.fingerprint
    return write_jsonl(output, lines(), asked)


def _wish(i: int, raw: Mapping[str, Any], default: Mapping[str, Any]) -> _Wish:
    given = {k: raw[k] for k in _FIELDS if raw.get(k) is not None}
    for name in ("regex", "template"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"Row {i}: {name} must be text, got {show(given[name])}.")
    for name in ("include", "more_prompts"):
        texts = given.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
            raise ValueError(
                f"Row {i}: {name} must be a list of texts, got {show(texts)}."
            )
    more = given.pop("more_prompts", [])
    merged = {**default, **given}
    wish = _Wish(
        merged["regex"], tuple(merged["include"]), merged["template"], 1 + len(more)
    )
    if wish.template and (wish.regex or wish.include):
        raise ValueError(
            f"Row {i}: a template excludes regex and include; write the blanks as "
            "part of the expression instead."
        )
    return wish


class _Judge:
    """The user's potential, each value checked; called from inside the computation.

    What goes wrong there is kept for `check`: an error that is raised inside comes out
    as a page of the compiler's.
    """

    def __init__(self, name: str, judge: judges.Judge, beta: float, prompts: list[str]):
        if not (beta > 0.0 and math.isfinite(beta)):
            raise ValueError(f"beta must be above 0 and finite, got {beta!r}.")
        if judges.is_pairwise(judge):
            raise ValueError(
                f"{name} compares two responses; a potential scores one: (prompt, "
                "response)."
            )
        self._name, self._beta, self._prompts = name, beta, prompts
        # Of a function its own values: wider than float32, and told as they are.
        self._ask = getattr(judge, "values", judge)
        self._error: Exception | None = None
        self.forbidden = 0  # responses that had -inf

    def __call__(self, responses: list[str], prompt_ids: list[int]) -> list[float]:
        """Log-potentials; -inf for all once something has gone wrong."""
        prompts = [self._prompts[i] for i in prompt_ids]
        if self._error is None:
            try:
                given = self._ask(prompts, responses)
                return [
                    self._value(*row)
                    for row in zip(prompts, responses, given, strict=True)
                ]
            except Exception as error:  # noqa: BLE001 - of the user's function, too
                self._error = error
        return [-math.inf] * len(responses)

    def _value(self, prompt: str, response: str, given: Any) -> float:
        try:
            score = float(given)
            value = score / self._beta
        except (TypeError, ValueError, OverflowError):
            score = value = math.nan
        if math.isnan(value) or value > _LARGEST:
            beyond = math.isfinite(score) and "beyond what float32 holds, " or ""
            raise ValueError(
                f"{self._name} gave {given!r} for the prompt {prompt[:80]!r} and the "
                f"response {response[:80]!r}, {beyond}with beta={self._beta!r}; "
                "expected a number, or -inf for what must not be."
            )
        self.forbidden += value == -math.inf
        return max(value, -_LARGEST) if value > -math.inf else value

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error


def _program(
    wish: _Wish, judge: _Judge | None, policy: checkpoints.Network, max_new_tokens: int
) -> programs.Program:
    vocabulary, num_tokens = policy.vocabulary, policy.model.config.vocab_size
    parts: list[programs.Program] = []
    if wish.template is not None:
        parts.append(_template(wish.template, vocabulary, num_tokens))
    elif wish.include or wish.regex is not None:
        constraint = constraints.must_include(
            wish.include, vocabulary, num_tokens, pattern=wish.regex
        )
        check_constraint(constraint, max_new_tokens)
        parts.append(constraint)
    if wish.contexts > 1:
        parts.append(programs.PromptIntersection(wish.contexts))
    if judge is not None:
        parts.append(programs.Potential(programs.text_function(judge, vocabulary)))
    if len(parts) > 1:
        return programs.Product(tuple(parts))
    return parts[0] if parts else programs.Program()


def _template(template: str, vocabulary: Any, num_tokens: int) -> programs.Program:
    """The program that fills a template's blanks and keeps its text to the letter."""
    if BLANK not in template:
        shown = quoted(repr(template))
        raise ValueError(f"The template {shown} has no {BLANK} in it.")
    texts = template.split(BLANK)
    if vocabulary.to_json()["kind"] == "bytes":
        parts = [ids for text in texts for ids in (None, vocabulary.encode(text))][1:]
        return programs.infilling([p for p in parts if p is None or p])
    parts: list[list[int] | None] = []
    spaced_blanks = []
    for i, text in enumerate(texts):
        if i:
            parts.append(None)
        ids, space_left = _fixed_ids(text, vocabulary, i > 0, i + 1 < len(texts))
        if space_left:
            spaced_blanks.append(i)  # the blank that follows
        if ids:
            parts.append(ids)
    spelt = [raw or b"" for raw in vocabulary.token_bytes()]
    spelt += [b""] * (num_tokens - len(spelt))
    spaced = jnp.array([raw.startswith(b" ") for raw in spelt])
    filling = programs.infilling(parts, spaced_blanks, spaced, vocabulary.eos_id)
    # What a blank ends with may still change the text behind it: an open escape, a
    # line's end that takes a space along. Such responses have no weight.
    kept = re.compile("(?s:.*)".join(map(re.escape, texts)))

    def whole(responses: list[str], prompt_ids: list[int]) -> list[float]:
        return [0.0 if kept.fullmatch(r) else -math.inf for r in responses]

    check = programs.Potential(programs.text_function(whole, vocabulary))
    return programs.Product((filling, check))


def _fixed_ids(
    text: str, vocabulary: Any, behind: bool, before: bool
) -> tuple[list[int], bool]:
    """Ids that spell a template's text to the letter; whether a space is left over.

    A blank comes before it (``behind``), or after it (``before``): then a last space is
    best left to the blank's first piece, which begins with one as the model is used to.
    """
    encode = vocabulary.encode_inside if behind else vocabulary.encode
    begun = vocabulary.encode("a") if behind else []
    word = vocabulary.encode("a")  # begins with a space

    def spells(ids: list[int], rest: list[int], expected: str) -> bool:
        found = vocabulary.decode([*begun, *ids, *rest])
        return found == vocabulary.decode(begun) + expected

    if before and text.endswith(" ") and (behind or text[:-1]):
        ids = encode(text[:-1]) if text[:-1] else []
        if spells(ids, word, text + "a"):
            return ids, True
    ids = encode(text) if text else []
    if not spells(ids, [], text):
        raise ValueError(
            f"The template's text {text!r} cannot be spelt by this vocabulary, it "
            f"would read {vocabulary.decode(ids)!r}: change it, or use a vocabulary "
            "with escapes or of bytes."
        )
    return ids, False


def _encoder_tokens(
    batch: list[int], rows: list[tuple], size: int, vocabulary: Any
) -> np.ndarray:
    """Prompts of a batch, ``[size, M, Le]``; repeated where they are too few."""

    def ids(text: str) -> list[int]:
        return [*vocabulary.encode(text), vocabulary.eos_id]

    tokens = [
        [ids(text) for text in (record["prompt"], *(raw.get("more_prompts") or []))]
        for raw, record in (rows[i] for i in batch)
    ]
    longest = max(len(t) for row in tokens for t in row)
    out = np.zeros(
        (size, len(tokens[0]), prompt_bucket(longest, sys.maxsize)), np.int32
    )
    for at in range(size):
        for m, prompt in enumerate(tokens[at % len(tokens)]):
            out[at, m, : len(prompt)] = prompt
    return out


def _lines(particles: Any, at: int, vocabulary: Any) -> list[dict[str, Any]]:
    own = jax.tree.map(lambda x: x[at], particles)
    evidence = float(own.log_evidence)
    min_ess = min(own.ess[own.ess > 0.0].tolist(), default=0.0)
    if not math.isfinite(evidence):
        shared = {"log_evidence": None, "min_ess": min_ess}
        return [{"response": None, "particle": 0, "weight": 0.0, **shared}]
    weights = scipy.special.softmax(own.log_weights.astype(np.float64))
    order = [n for n in np.argsort(-weights, kind="stable") if weights[n] > 0.0]
    return [
        {
            "response": vocabulary.decode(own.tokens[n, : own.lengths[n]].tolist()),
            "particle": rank,
            "weight": float(weights[n]),
            "logp": float(own.logps[n]),
            "num_tokens": int(own.lengths[n]),
            "log_evidence": evidence,
            "min_ess": min_ess,
        }
        for rank, n in enumerate(order)
    ]
