"""`jaxalign steer`: responses under constraints and rewards, with their evidence."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxalign.data import records
from jaxalign.data.bad_rows import quoted, show
from jaxalign.decoding import constraints, programs
from jaxalign.decoding.smc import smc
from jaxalign.evaluation import judges
from jaxalign.pipelines import generation
from jaxalign.pipelines.inference import write_jsonl
from jaxalign.training import checkpoints, exclusive

_log = logging.getLogger(__name__)

BLANK = "[BLANK]"
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
      potential: ``"package.module:function"``, ``(prompt, response) -> score``; the
        target is the model times ``exp(score / beta)``.
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
      The number of lines written.

    Raises:
      ValueError: naming the row or the argument.
    """
    policy = checkpoints.newest_policy(checkpoint)
    examples, _ = records.load(
        prompts,
        "prompts",
        field_map=field_map,
        on_bad_row=on_bad_row,
        listing=generation.bad_rows_beside(output),
    )
    rows = [(e.raw, record["prompt"]) for e in examples for record in e.records]
    default = {"regex": regex, "include": tuple(include), "template": template}
    wishes = [_wish(i, raw, default) for i, (raw, _) in enumerate(rows)]
    reward = None
    if potential:
        reward = _reward(potential, beta, [text for _, text in rows], policy.vocabulary)
    program_of = functools.cache(lambda wish: _program(wish, reward, policy))
    groups: dict[_Wish, list[int]] = {}
    for i, wish in enumerate(wishes):
        program_of(wish)  # mistakes come before anything is computed
        groups.setdefault(wish, []).append(i)

    found: dict[int, list[dict[str, Any]]] = {}
    with tqdm(total=len(rows), desc="steer", unit="prompt", disable=None) as bar:
        for wish, members in groups.items():
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                particles = jax.device_get(
                    smc(
                        policy.model,
                        policy.params,
                        _encoder_tokens(batch, rows, batch_size, policy.vocabulary),
                        program_of(wish),
                        key=jax.random.key(seed),
                        prompt_ids=np.resize(batch, batch_size),
                        num_particles=num_particles,
                        expansion=expansion,
                        resampling=resampling,
                        ess_threshold=ess_threshold,
                        merge=merge,
                        temperature=temperature,
                        max_new_tokens=max_new_tokens,
                        vocab_size=policy.vocabulary.vocab_size,
                    )
                )
                for at, i in enumerate(batch):
                    found[i] = _lines(particles, at, policy.vocabulary)
                bar.update(len(batch))
    dead = sum(lines[0]["response"] is None for lines in found.values())
    if dead:
        _log.warning(
            "No particle of %d of %d prompts survived; more particles, a larger "
            "expansion or more new tokens may help.",
            dead,
            len(rows),
        )

    def lines() -> Iterable[dict[str, Any]]:
        for i, (raw, _) in enumerate(rows):
            yield from ({**raw, **line} for line in found[i])

    return write_jsonl(output, lines())


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


def _reward(path: str, beta: float, texts: list[str], vocabulary: Any):
    if not beta > 0.0:
        raise ValueError(f"beta must be above 0, got {beta!r}.")
    judge = judges.resolve_callable(path)

    def score(responses: list[str], prompt_ids: list[int]) -> list[float]:
        pairs = zip(prompt_ids, responses, strict=True)
        return [float(judge(texts[i], response)) / beta for i, response in pairs]

    return programs.Potential(programs.text_function(score, vocabulary))


def _program(wish: _Wish, reward: Any, policy: checkpoints.Policy) -> programs.Program:
    vocabulary, num_tokens = policy.vocabulary, policy.model.config.vocab_size
    parts: list[programs.Program] = []
    if wish.template is not None:
        parts.append(_template(wish.template, vocabulary))
    elif wish.include:
        parts.append(
            constraints.must_include(
                wish.include, vocabulary, num_tokens, pattern=wish.regex
            )
        )
    elif wish.regex is not None:
        parts.append(constraints.regex(wish.regex, vocabulary, num_tokens))
    if wish.contexts > 1:
        parts.append(programs.PromptIntersection(wish.contexts))
    if reward is not None:
        parts.append(reward)
    if not parts:
        return programs.Unconditioned()
    return parts[0] if len(parts) == 1 else programs.Product(tuple(parts))


def _template(template: str, vocabulary: Any) -> programs.Infilling:
    if BLANK not in template:
        shown = quoted(repr(template))
        raise ValueError(f"The template {shown} has no {BLANK} in it.")
    # SentencePiece begins every piece of fixed text with a space of its own.
    own_space = vocabulary.to_json()["kind"] == "sentencepiece"
    parts: list[list[int] | None] = []
    for i, text in enumerate(template.split(BLANK)):
        if i:
            parts.append(None)
        if own_space:
            text = text.removeprefix(" ").removesuffix(" ")
        if text:
            parts.append(list(vocabulary.encode(text)))
    return programs.infilling(parts)


def _encoder_tokens(
    batch: list[int], rows: list[tuple], size: int, vocabulary: Any
) -> np.ndarray:
    """Prompts of a batch, ``[size, M, Le]``; repeated where they are too few."""

    def ids(text: str) -> list[int]:
        return [*vocabulary.encode(text), vocabulary.eos_id]

    texts = [[rows[i][1], *(rows[i][0].get("more_prompts") or [])] for i in batch]
    tokens = [[ids(text) for text in row] for row in texts]
    longest = max(len(t) for row in tokens for t in row)
    length = max(16, 1 << (longest - 1).bit_length())
    out = np.zeros((size, len(tokens[0]), length), np.int32)
    for at in range(size):
        for m, prompt in enumerate(tokens[at % len(tokens)]):
            out[at, m, : len(prompt)] = prompt
    return out


def _lines(particles: Any, at: int, vocabulary: Any) -> list[dict[str, Any]]:
    log_weights = particles.log_weights[at].astype(np.float64)
    evidence = float(particles.log_evidence[at])
    ess = particles.ess[at]
    shared = {
        "log_evidence": evidence if math.isfinite(evidence) else None,
        "min_ess": float(ess[ess > 0.0].min(initial=math.inf))
        if (ess > 0.0).any()
        else 0.0,
    }
    if not math.isfinite(evidence):
        return [{"response": None, "particle": 0, "weight": 0.0, **shared}]
    weights = np.exp(log_weights - log_weights.max())
    weights = weights / weights.sum()
    order = [n for n in np.argsort(-weights, kind="stable") if weights[n] > 0.0]
    return [
        {
            "response": vocabulary.decode(
                particles.tokens[at, n, : particles.lengths[at, n]].tolist()
            ),
            "particle": rank,
            "weight": float(weights[n]),
            "logp": float(particles.logps[at, n]),
            "num_tokens": int(particles.lengths[at, n]),
            **shared,
        }
        for rank, n in enumerate(order)
    ]
