"""MetaRM: a reward model that goes on telling its policy's samples apart."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses
from jaxalign.batch import Batch
from jaxalign.models.reward import PAIRWISE
from jaxalign.objectives.base import LossOutput, Params, Statistics, Step
from jaxalign.objectives.metrics import Mean
from jaxalign.objectives.reward import BradleyTerry

# Of two samples of a policy, neither of which is preferred: how many there are of their
# prompt. 0: a preference.
batches.add_column("pair_samples", "BQ", optional=True)


@dataclasses.dataclass(frozen=True)
class MetaRM(BradleyTerry):
    """Bradley-Terry, stepped from where samples are told apart better.

    Dou et al. 2024 (arXiv 2405.00438) and Wang et al. 2024 (2401.06080, §4). With ``J``
    the mean over prompts of ``2 / k^2 sum_{i<j} sigmoid(|r_i - r_j|)`` of their ``k``
    samples, a step is::

        ahead  = params + meta_rate * gradient of J at params
        params = optimizer(params, gradient of the preferences' loss at ahead)

    to first order: nothing is differentiated through ``ahead``. `J` is the whole
    batch's, by `statistics`, and a batch without samples makes it Bradley-Terry.

    Rows with ``pair_samples``, the number ``k`` of different samples of their prompt,
    are pairs of those in any order, all ``k (k - 1) / 2`` of them; the others are
    preferences.

    Attributes:
      meta_rate: of the step ahead, plain gradient ascent with all parameters of the
        network.
    """

    meta_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.meta_rate >= 0.0:
            raise ValueError(
                f"MetaRM.meta_rate must be at least 0, got {self.meta_rate}."
            )
        if self.read in PAIRWISE:
            raise ValueError(
                f"MetaRM.read={self.read!r} compares two responses; samples are told "
                "apart by a score of each: take 'response_last'."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return (*super().columns, "pair_samples")

    def scored(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What is preferred and what is not; no samples."""
        found, mask = super().scored(params, batch)
        return found, mask * _in_preferences(batch)

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        return super().denominators(_preferences(batch))

    def statistics(self, params: Params, batch: Batch) -> Statistics:
        """The gradient of `J`, and how far apart samples are."""
        params = jax.lax.stop_gradient(params)
        weight, prompts = self._samples(batch)

        def spread(reward: Params) -> tuple[jax.Array, jax.Array]:
            values = self._gaps({**params, "reward": reward}, batch)
            return jnp.sum(values * weight), values

        (_, values), slope = jax.value_and_grad(spread, has_aux=True)(params["reward"])
        count = jnp.sum(prompts)
        # From 0, where all samples tie, to 1: each pair counts as its prompt's share.
        apart = jnp.sum((2.0 * values - 1.0) * prompts)
        return {"ascent": (slope, count), "apart": (apart, count)}

    def loss(self, params: Params, step: Step) -> LossOutput:
        slope, count = step.statistics["ascent"]
        rate = self.meta_rate / jnp.where(count > 0, count, 1.0)
        ahead = jax.tree.map(
            lambda p, g: p + jax.lax.stop_gradient(rate * g).astype(p.dtype),
            params["reward"],
            slope,
        )
        preferences = step._replace(batch=_preferences(step.batch))
        out = super().loss({**params, "reward": ahead}, preferences)
        return out._replace(
            metrics={**out.metrics, "meta/spread": Mean(*step.statistics["apart"])}
        )

    def _gaps(self, params: Params, batch: Batch) -> jax.Array:
        """``[B, Q]``: `losses.score_spread` of samples, the mean of the members'."""
        weights = jnp.asarray(list(self.networks()["reward"].weights.values()))
        scores = jnp.sum(self.outputs(params, Step(batch)) * weights, axis=-1)
        one, other = (
            jnp.take_along_axis(scores, batch[name][..., None], axis=1)
            for name in ("pair_chosen", "pair_rejected")
        )
        where = (_of_samples(batch) > 0)[..., None]
        spread = losses.score_spread(
            one, other, where=jnp.broadcast_to(where, one.shape)
        )
        return jnp.mean(spread, axis=-1)

    def _samples(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Of each pair ``[B, Q]`` its weight in `J`, and its share of a prompt."""
        real, k = _of_samples(batch), jnp.maximum(_siblings(batch), 2.0)
        return real * 2.0 / k**2, real * 2.0 / (k * (k - 1.0))


def _siblings(batch: Batch) -> jax.Array:
    """``[B, Q]``: the samples of a pair's prompt; 0 of preferences."""
    return batch.get("pair_samples", jnp.zeros_like(batch["pair_mask"]))


def _of_samples(batch: Batch) -> jax.Array:
    """``[B, Q]`` mask of pairs of samples."""
    return batch["pair_mask"] * (_siblings(batch) > 0)


def _preferences(batch: Batch) -> Batch:
    """The batch with preferences alone for its pairs."""
    return {**batch, "pair_mask": batch["pair_mask"] - _of_samples(batch)}


def _in_preferences(batch: Batch) -> jax.Array:
    """``[B, R]`` mask of the responses of preferences."""
    mask, responses = _preferences(batch)["pair_mask"], batch["response_mask"].shape[1]
    named = [
        jnp.any(
            (batch[name][..., None] == jnp.arange(responses)) & (mask[..., None] > 0),
            axis=1,
        )
        for name in ("pair_chosen", "pair_rejected")
    ]
    return (named[0] | named[1]).astype(jnp.float32)
