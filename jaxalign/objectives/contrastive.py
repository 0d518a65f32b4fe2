"""Reward models whose features a contrastive loss spreads.

Wang et al. 2024, *Secrets of RLHF in Large Language Models Part II* (arXiv 2401.06080).
Each input runs through the network twice, under two dropout masks: two *views* of one
thing. Preferences are learnt from both, and a contrastive loss compares all views of
the batch, so that a batch cannot be cut into microbatches.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.batch import Batch
from jaxalign.models.reward import PAIRWISE
from jaxalign.objectives.base import LossOutput, Params, Step, answers
from jaxalign.objectives.metrics import Mean
from jaxalign.objectives.reward import BradleyTerry

COMPARED = ("responses", "differences")


@dataclasses.dataclass(frozen=True)
class ContrastiveReward(BradleyTerry):
    """Bradley-Terry on two views of each response, and a contrastive loss on features.

    Attributes:
      dropout: what makes the views differ, and so has to be on.
      view_dropout: the network's rate of it (the paper's is 0.05); None: that of its
        configuration.
      contrast: weight of the contrastive loss.
      compared: ``"responses"``: the features of each; ``"differences"``: of each pair
        the difference of its features, chosen less rejected, and its negative.
      temperature: of the contrastive loss.
    """

    dropout: bool = True
    view_dropout: float | None = None
    contrast: float = 1.0
    compared: str = "responses"
    temperature: float = 0.05

    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self).__name__
        if self.compared not in COMPARED:
            raise ValueError(
                f"{kind}.compared must be one of {COMPARED}, got {self.compared!r}."
            )
        if self.read in PAIRWISE:
            raise ValueError(
                f"{kind}.read={self.read!r} reads two responses at once, and no "
                "response has features of its own: take 'response_last'."
            )
        if not self.temperature > 0.0 or not self.contrast >= 0.0:
            raise ValueError(
                f"{kind} needs a temperature above 0 and a contrast of at least 0, got "
                f"{self.temperature} and {self.contrast}."
            )
        if not self.dropout:
            raise ValueError(
                f"{kind}.dropout=False: the two views of a response differ by their "
                "dropout masks, and would be the same. Leave it on."
            )

        if self.view_dropout is not None and not 0.0 < self.view_dropout < 1.0:
            raise ValueError(
                f"{kind}.view_dropout must lie in (0, 1), or be None for the network's "
                f"own dropout_rate, got {self.view_dropout}."
            )

    def networks(self) -> dict[str, Any]:
        network = super().networks()["reward"]
        if self.view_dropout is None:
            return {"reward": network}
        config = dataclasses.replace(network.config, dropout_rate=self.view_dropout)
        return {"reward": network.clone(config=config)}

    @abc.abstractmethod
    def contrastive(
        self, params: Params, views: tuple[jax.Array, jax.Array], where: jax.Array
    ) -> jax.Array:
        """A loss for each row of two views ``[n, E]``, the mask's among them."""

    def features(self, params: Params, step: Step) -> jax.Array:
        """What scores are read off, ``[B, R, E]``."""
        drops = step.key is not None
        return self.networks()["reward"].apply(
            {"params": params["reward"]},
            step.batch,
            deterministic=not drops,
            rngs={"dropout": step.key} if drops else {},
            method="features",
        )

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        compared = jnp.sum(self._compared(batch))
        return {**super().denominators(batch), "compared": compared}

    def loss(self, params: Params, step: Step) -> LossOutput:
        batch, network = step.batch, self.networks()["reward"]
        keys = [None] if step.key is None else jax.random.split(step.key)
        views = [self.features(params, step._replace(key=key)) for key in keys]
        found = [
            self.loss_of(
                batch,
                network.apply({"params": params["reward"]}, view, method="heads"),
            )
            for view in views
        ]
        votes = sum(out.sums["votes"] for out in found) / len(found)
        where = self._compared(batch)
        vectors = [self._vectors(batch, view) for view in (views[0], views[-1])]
        terms = self.contrastive(params, (vectors[0], vectors[1]), where)
        metrics = {**found[0].metrics, "contrast/loss": Mean.of(terms, where)}
        one, other = jax.lax.stop_gradient(vectors)
        norms = jnp.linalg.norm(one, axis=1) * jnp.linalg.norm(other, axis=1)
        cosine = jnp.sum(one * other, axis=1) / jnp.maximum(norms, 1e-30)
        metrics["contrast/view_similarity"] = Mean.of(cosine, where)
        return LossOutput(
            {"votes": votes, "compared": self.contrast * jnp.sum(terms)}, metrics
        )

    def _compared(self, batch: Batch) -> jax.Array:
        """``[n]``: which of the batch's places hold a vector."""
        if self.compared == "responses":
            return answers(batch).reshape(-1)
        return jnp.tile(batch["pair_mask"].reshape(-1), 2)

    def _vectors(self, batch: Batch, features: jax.Array) -> jax.Array:
        """``[n, E]``."""
        size = features.shape[-1]
        if self.compared == "responses":
            return features.reshape(-1, size)
        chosen, rejected = (
            jnp.take_along_axis(features, batch[name][..., None], axis=1)
            for name in ("pair_chosen", "pair_rejected")
        )
        gaps = (chosen - rejected).reshape(-1, size)
        return jnp.concatenate([gaps, -gaps])


@dataclasses.dataclass(frozen=True)
class SimCSEReward(ContrastiveReward):
    """A view of a response is to be told from the views of all others, by InfoNCE."""

    def contrastive(
        self, params: Params, views: tuple[jax.Array, jax.Array], where: jax.Array
    ) -> jax.Array:
        del params
        return losses.info_nce(*views, temperature=self.temperature, where=where)


@dataclasses.dataclass(frozen=True)
class SwAVReward(ContrastiveReward):
    """Both views are to be assigned to the same prototypes, all used alike.

    Attributes:
      prototypes: how many; parameters of the network.
      epsilon: of the assignments' entropy, see `jaxalign.losses.sinkhorn`.
      iterations: of Sinkhorn's algorithm.
    """

    contrast: float = 0.1
    temperature: float = 0.1
    prototypes: int = 50
    epsilon: float = 0.05
    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prototypes < 2 or self.iterations < 1 or not self.epsilon > 0.0:
            raise ValueError(
                "SwAVReward needs at least 2 prototypes, 1 iteration and an epsilon "
                f"above 0, got {self.prototypes}, {self.iterations} and {self.epsilon}."
            )

    @property
    def network_options(self) -> dict[str, Any]:
        return {**super().network_options, "prototypes": self.prototypes}

    def contrastive(
        self, params: Params, views: tuple[jax.Array, jax.Array], where: jax.Array
    ) -> jax.Array:
        return losses.swav(
            *views,
            params["reward"]["prototypes"],
            temperature=self.temperature,
            epsilon=self.epsilon,
            iterations=self.iterations,
            where=where,
        )
