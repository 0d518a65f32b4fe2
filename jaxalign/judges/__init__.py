"""Judges: prompts and responses in, numbers out, in batches, NaN for no verdict.

One string names a judge on the command line and in gin:

* ``my_judge.py:score``, ``package.module:function``: a function of a prompt and a
  response, or of a prompt and two responses, or of lists of them;
* ``reward:runs/rm``: a scalar network of a checkpoint (`rewards`);
* ``likelihood:runs/dpo``: log-probability of the response; ``#mean`` per token;
* ``token:runs/metricx#250089``: logit of one token, first of the decoder's;
  ``token:monot5#1176,6136``: probability of the first of two (`first_step`);
* ``text:TEACHER#rubric.md``: a teacher (`jaxalign.teachers`) asked with a rubric;
* ``0.7*my_judge.py:score + 0.3*reward:runs/rm``: sums and differences of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxalign import user_code
from jaxalign.evaluation.judging import (
    Judge,
    PairwiseJudge,
    is_pairwise,
    preferences,
    scores,
    verdicts,
)
from jaxalign.judges import first_step, network, rewards, text
from jaxalign.judges.functions import from_function
from jaxalign.judges.text import TextJudge, TextPreference

__all__ = [
    "Judge",
    "PairwiseJudge",
    "TextJudge",
    "TextPreference",
    "WeightedSum",
    "from_function",
    "is_pairwise",
    "preferences",
    "resolve",
    "scores",
    "verdicts",
]


class WeightedSum:
    """``sum_i weight_i * score_i``; NaN where any part has no verdict.

    Args:
      parts: ``(weight, judge)``, each asked once about a batch.

    Raises:
      ValueError: for a part that compares responses instead of scoring one.
    """

    def __init__(self, parts: Sequence[tuple[float, Judge]]):
        for _, judge in parts:
            if is_pairwise(judge):
                raise ValueError(
                    "A sum of judges is of scores, and one of its parts compares two "
                    f"responses: {judge.fingerprint}."
                )
        self._parts = list(parts)
        self.fingerprint = " + ".join(f"{w!r}*{j.fingerprint}" for w, j in parts)

    def __call__(self, prompts, responses, metadata=None):
        """Float32 ``[n]``; the sum is taken in float64."""
        found = np.zeros(len(responses))
        for weight, judge in self._parts:
            scores = np.asarray(judge(prompts, responses, metadata), np.float32)
            found += weight * scores.astype(np.float64)
        return found.astype(np.float32)


KINDS: dict[str, Callable[[str], Judge | PairwiseJudge]] = {
    "reward": rewards.reward,
    "likelihood": network.likelihood,
    "token": first_step.token,
    "text": text.judge,
}
_FORMS = (
    "A judge is file.py:function, package.module:function, reward:RUN_DIR, "
    "likelihood:RUN_DIR, token:RUN_DIR[?clip=0,25]#ID[,ID], text:TEACHER#RUBRIC.md, "
    "or a sum such as "
    "'0.7*file.py:function + 0.3*reward:RUN_DIR'."
)
_SIGN = re.compile(r"\s+([+-])\s+")  # a path may hold either, with no space about it
_WEIGHTED = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*\*\s*(.+)", re.I)


def resolve(name: str) -> Judge | PairwiseJudge:
    """The judge that a string names, as above; networks are loaded when first asked.

    Raises:
      ValueError: saying what was not understood, and the nearest that would be.
      FileNotFoundError: for a checkpoint or rubric that is not there.

    >>> resolve("2*operator:eq - 0.5*operator:ne")(["a", "a"], ["a", "b"])
    array([ 2. , -0.5], dtype=float32)
    """
    first, *more = _SIGN.split(name.strip())
    signed = [("+", first), *zip(more[0::2], more[1::2], strict=True)]
    parts = []
    for sign, term in signed:
        weighted = _WEIGHTED.fullmatch(term)
        weight, part = weighted.groups() if weighted else ("1", term)
        parts.append((float(sign + "1") * float(weight), _one(part)))
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    return WeightedSum(parts)


def _one(name: str) -> Judge | PairwiseJudge:
    kind, _, rest = name.partition(":")
    if kind in KINDS:
        if not rest:
            raise ValueError(f"The judge {name!r} names nothing to ask. {_FORMS}")
        return KINDS[kind](rest)
    try:
        found = user_code.resolve_callable(name)
    except ValueError as error:
        near = user_code.hint(kind, KINDS)
        if rest and not near or isinstance(error, user_code.NoFunctionError):
            raise
        raise ValueError(f"{error}{near} {_FORMS}") from error
    return found if hasattr(found, "fingerprint") else from_function(found, name)
