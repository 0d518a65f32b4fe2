"""Weighted sums of judges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.evaluation.judging import Judge, is_pairwise


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
