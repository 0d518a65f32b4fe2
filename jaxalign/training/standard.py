"""What the scores of a reward model are standardised by: in every checkpoint's meta.

Pairs leave the offset of a score open and a run's length decides its spread, so that
scores of two models, or of two heads of one, are not comparable as they are. A
checkpoint of an objective that is ``standardised`` says mean and deviation of each
head's scores over training data: ``meta["score_stats"]``.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np

from jaxalign.cluster import mesh as meshes
from jaxalign.training import step as steps
from jaxalign.training.run import Setup

_log = logging.getLogger(__name__)

ROWS = 512  # encoder rows that are scored at each checkpoint, at most one epoch


class Standard:
    """Scores the batches of a run's first steps, always the same ones.

    Args:
      ready: the run.
    """

    def __init__(self, ready: Setup):
        self._ready, self._compiled = ready, None

    def of(self, state: steps.TrainState) -> dict[str, Any]:
        """What a checkpoint's ``meta`` says: ``score_stats``; nothing of a policy.

        Returns:
          ``{"mean": [members][attributes], "deviation": the same, "count"}``. A head
          whose scores all are equal has the deviation 1, with a warning.
        """
        ready = self._ready
        if not ready.objective.standardised:
            return {}
        if self._compiled is None:
            self._compiled = _scores(ready)
        feed = ready.inputs.train
        rows = meshes.process_rows(ready.mesh, feed.batch_size)
        count = -(-ROWS // feed.batch_size)
        if not getattr(feed, "endless", False):
            count = min(count, feed.steps_per_epoch)
        found = []
        for number in range(count):
            batch = meshes.put_batch(
                ready.mesh, feed.batch(number, rows), feed.batch_size
            )
            values, mask = jax.device_get(self._compiled(state, batch))
            found.append(values[mask > 0].astype(np.float64))
        values = np.concatenate(found)
        mean, deviation = values.mean(0), values.std(0)
        flat = ~(deviation > np.finfo(np.float32).eps * np.abs(values).max(0))
        if flat.any():
            _log.warning(
                "%d of %d heads give %d responses of the training data one and the "
                "same score: they tell nothing apart.",
                flat.sum(),
                flat.size,
                len(values),
            )
        deviation[flat] = 1.0
        told = {"mean": mean.tolist(), "deviation": deviation.tolist()}
        return {"score_stats": {**told, "count": len(values)}}


def _scores(ready: Setup) -> Any:
    def scores(state: steps.TrainState, batch: Any) -> Any:
        networks = ready.partition.join(state.params, state.frozen)
        return ready.objective.scored(networks, batch)

    return jax.jit(
        meshes.with_activation_rules(ready.mesh, scores),
        out_shardings=meshes.replicated(ready.mesh),
    )
