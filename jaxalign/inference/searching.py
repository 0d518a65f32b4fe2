"""Search instead of sampling, and the choice of one sample, for `jaxalign generate`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxalign import user_code
from jaxalign.data.bad_rows import nearest
from jaxalign.decoding import (
    BeamSearch,
    Constraint,
    Generation,
    beam_search,
    contrastive_search,
    mbr,
)
from jaxalign.decoding.generator import prompt_bucket
from jaxalign.training import checkpoints


def check(asked: Mapping[str, Any]) -> None:
    """Refuses settings of which one would silently not count."""
    beams, contrastive = asked["num_beams"] > 1, asked["contrastive_alpha"] > 0
    if beams and contrastive:
        raise ValueError("num_beams and contrastive_alpha are two searches: give one.")
    if asked["mbr"] and (beams or contrastive or asked["num_samples"] < 2):
        raise ValueError(
            "mbr chooses among samples: give num_samples of at least 2, and neither "
            "num_beams nor contrastive_alpha."
        )
    if contrastive and asked["num_samples"] > 1:
        raise ValueError("Contrastive search gives one response: num_samples=1.")
    if not beams and (asked["num_groups"] > 1 or asked["diversity_penalty"]):
        raise ValueError("num_groups and diversity_penalty need num_beams above 1.")
    if not (beams or contrastive):
        return
    idle: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "typical_p"), 1.0)
    idle |= dict.fromkeys(("regex", "slots", "mesh"))
    idle |= {"min_p": 0.0, "include": (), "stop": ()}
    if beams:
        idle["top_k"] = 0
    else:
        idle |= {"repetition_penalty": 1.0, "min_new_tokens": 0, "bad_words": ()}
    set_ = [n for n, off in idle.items() if asked[n] != off and asked[n] != []]
    if set_:
        name = "Beam" if beams else "Contrastive"
        raise ValueError(f"{name} search has no {', '.join(set_)}: leave out.")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search or a choice gives for one prompt, best first."""

    texts: list[str | None]  # None where one could not meet the constraint
    tokens: list[np.ndarray]  # ids, EOS included where one came
    logp: np.ndarray  # float64, summed log-probabilities
    more: list[dict[str, float]]  # further numbers of each response, by name


def search(
    policy: checkpoints.Network,
    prompts: Sequence[str],
    *,
    num_samples: int,
    max_new_tokens: int,
    max_prompt_length: int | None,
    batch_size: int,
    beams: BeamSearch | None = None,
    contrastive: tuple[int, float] | None = None,
    constraint: Constraint | None = None,
    start: int = 0,
) -> Iterator[Found]:
    """Yields the best responses to each prompt, in order, from `start` on.

    Of a beam search, perhaps with a constraint, or of a contrastive search with ``(k,
    alpha)``. Longer prompts are cut and keep their EOS. Which of them share a batch,
    and so every bit of the result, does not depend on `start`.
    """
    vocabulary, eos = policy.vocabulary, policy.vocabulary.eos_id
    if beams:
        rules = dataclasses.replace(beams.rules, eos_id=eos)
        beams = dataclasses.replace(beams, rules=rules)
        asked = {"search": beams, "num_return": num_samples, "constraint": constraint}
        method = functools.partial(beam_search, **asked)
    else:
        k, alpha = contrastive
        method = functools.partial(
            contrastive_search, top_k=k, penalty_alpha=alpha, eos_id=eos
        )
    tokens = [[*vocabulary.encode(text), eos] for text in prompts]
    limit = max_prompt_length or max(map(len, tokens), default=1)
    tokens = [t if len(t) <= limit else [*t[: limit - 1], eos] for t in tokens]
    with tqdm(
        total=len(tokens), initial=start, desc="search", unit="prompt", disable=None
    ) as bar:
        for first in range(start // batch_size * batch_size, len(tokens), batch_size):
            rows = tokens[first : first + batch_size]
            length = prompt_bucket(max(map(len, rows)), limit)
            padded = np.zeros((batch_size, length), np.int32)
            for row, ids in enumerate(rows):
                padded[row, : len(ids)] = ids
            found = jax.device_get(
                method(
                    policy.model, policy.params, padded, max_new_tokens=max_new_tokens
                )
            )
            if beams:
                norms = np.asarray(beams.normalizer(found.lengths), np.float64)
                logps = found.scores.astype(np.float64) * norms
            else:
                logps = found.logps.sum(-1, dtype=np.float64)
            for row in range(max(0, start - first), len(rows)):
                sizes = enumerate(found.lengths[row])
                ids = [found.tokens[row, n, :size] for n, size in sizes]
                more = [{}] * len(ids)
                if beams:
                    more = [{"score": float(s)} for s in found.scores[row]]
                texts = [vocabulary.decode(own.tolist()) for own in ids]
                bar.update(1)
                yield Found(texts, ids, logps[row], more)


# Sentence-level, ``(hypothesis, reference) -> larger is better``, by sacrebleu.
_METRICS = ("chrf", "bleu")


def text_metric(name: str) -> Callable[[str, str], float]:
    """A metric of two texts: ``chrf``, ``bleu``, or any ``module:function``."""
    if ":" in name:
        return user_code.resolve_callable(name)
    if name not in _METRICS:
        raise ValueError(
            f"--mbr={name}: expected one of {_METRICS} or module:function"
            f"{nearest(name, _METRICS)}."
        )
    try:
        import sacrebleu
    except ImportError:
        raise ImportError(
            f"--mbr={name} needs sacrebleu: pip install 'jaxalign[metrics]'."
        ) from None
    score = getattr(sacrebleu, f"sentence_{name}")
    return lambda h, r: score(h, [r]).score


def choose(
    generations: Iterator[Generation], metric: Callable[[str, str], float]
) -> Iterator[Found]:
    """Of each prompt's samples the one with the least Bayes risk."""
    for generation in generations:
        fit = [i for i, text in enumerate(generation.texts) if text is not None]
        best, utility = 0, None
        if fit:
            texts = [generation.texts[i] for i in fit]
            utilities = mbr.expected_utilities(texts, metric)
            best, utility = fit[int(np.argmax(utilities))], float(max(utilities))
        one = slice(best, best + 1)
        yield Found(
            *(generation.texts[one], generation.tokens[one], generation.logp[one]),
            [{"utility": utility}],
        )
