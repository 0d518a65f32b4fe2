"""Search instead of sampling, and the choice of one sample, for `jaxalign generate`."""

from __future__ import annotations

import dataclasses
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
    idle = {
        "temperature": 1.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "regex": None,
        "slots": None,
        "mesh": None,
    }
    if beams:
        idle["top_k"] = 0
    else:
        idle |= {"repetition_penalty": 1.0, "min_new_tokens": 0}
    set_ = [n for n, off in idle.items() if asked[n] != off]
    set_ += [n for n in ("include", "stop") if asked[n]]
    if contrastive and asked["bad_words"]:
        set_.append("bad_words")
    if set_:
        name = "Beam" if beams else "Contrastive"
        raise ValueError(f"{name} search has no {', '.join(set_)}: leave out.")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search or a choice gives for one prompt, best first.

    Attributes:
      texts: responses; None where one could not meet the constraint.
      tokens: their ids, EOS included where one came.
      logp: float64, summed log-probabilities.
      more: further numbers of each response, by name.
    """

    texts: list[str | None]
    tokens: list[np.ndarray]
    logp: np.ndarray
    more: list[dict[str, float]]


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

    Args:
      policy: a loaded checkpoint.
      prompts: texts.
      num_samples: responses per prompt; 1 for contrastive search.
      max_new_tokens: of a response, EOS included.
      max_prompt_length: longer prompts are cut and keep their EOS.
      batch_size: prompts at a time. Which prompts share a batch, and so every bit of
        the result, does not depend on `start`.
      beams: the rules of a beam search.
      contrastive: ``(k, alpha)`` of a contrastive search, in place of `beams`.
      constraint: of a beam search.
      start: the first prompt.
    """
    vocabulary, eos = policy.vocabulary, policy.vocabulary.eos_id
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
            if contrastive:
                k, alpha = contrastive
                samples = jax.device_get(
                    contrastive_search(
                        policy.model,
                        policy.params,
                        padded,
                        max_new_tokens=max_new_tokens,
                        top_k=k,
                        penalty_alpha=alpha,
                    )
                )
                found, lengths = samples.tokens, samples.lengths
                logps = samples.logps.sum(-1, dtype=np.float64)
                scores = None
            else:
                result = jax.device_get(
                    beam_search(
                        policy.model,
                        policy.params,
                        padded,
                        max_new_tokens=max_new_tokens,
                        search=beams,
                        num_return=num_samples,
                        constraint=constraint,
                    )
                )
                found, lengths, scores = result.tokens, result.lengths, result.scores
                logps = scores.astype(np.float64) * np.asarray(
                    beams.normalizer(lengths), np.float64
                )
            for row in range(len(rows)):
                if first + row < start:
                    continue
                texts = [found[row, n, :m] for n, m in enumerate(lengths[row])]
                bar.update(1)
                yield Found(
                    [vocabulary.decode(ids.tolist()) for ids in texts],
                    texts,
                    logps[row],
                    [{"score": float(s)} for s in scores[row]]
                    if scores is not None
                    else [{}] * len(texts),
                )


# Sentence-level, ``(hypothesis, reference) -> larger is better``, by sacrebleu.
_METRICS = ("chrf", "bleu")


def text_metric(name: str) -> Callable[[str, str], float]:
    """A metric of two texts: ``chrf``, ``bleu``, or any ``module:function``.

    Raises:
      ValueError: for an unknown name.
      ImportError: when sacrebleu is absent.
    """
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
    if name == "chrf":
        return lambda h, r: sacrebleu.sentence_chrf(h, [r]).score
    return lambda h, r: sacrebleu.sentence_bleu(h, [r]).score


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
        yield Found(
            [generation.texts[best]],
            [generation.tokens[best]],
            generation.logp[best : best + 1],
            [{"utility": utility}],
        )
