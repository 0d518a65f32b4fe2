"""Reward models that learn from numbers and rankings of single responses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses
from jaxalign.batch import Batch
from jaxalign.models.reward import PAIRWISE, attribute_text
from jaxalign.objectives.base import LossOutput, Params, Step, answers
from jaxalign.objectives.metrics import Mean, Pairs
from jaxalign.objectives.reward import RewardObjective, add_attribute

# On a Likert scale, from 1 on.
batches.add_column("response_level", "BR")


@dataclasses.dataclass(frozen=True)
class RewardRegression(RewardObjective):
    """Scores that say a given number, or a level of a Likert scale.

    Attributes:
      levels: of the scale, from 1 on: rows say ``response_level``, and the score is
        what cumulative links compare with thresholds between the levels. 0: the rows'
        ``reward``, standardised, is regressed on.
      attributes: ``{name: weight}`` of several heads, whose weighted sum is the score.
        Rows then say ``response_<name>``, in units of their own, or as levels; nothing
        where it is not known.
    """

    levels: int = 0
    attributes: Mapping[str, float] | None = None

    schema: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read in PAIRWISE:
            raise ValueError(
                f"RewardRegression.read={self.read!r} compares two responses; a number "
                "belongs to one: take 'response_last', or runs/reward_model.gin."
            )
        for name in self.attributes or ():
            add_attribute(f"response_{name}", "BR", math.nan)

    @property
    def columns(self) -> tuple[str, ...]:
        if self.attributes:
            return tuple(f"response_{name}" for name in self.attributes)
        return ("response_level",) if self.levels else ("response_reward",)

    @property
    def network_options(self) -> dict[str, Any]:
        text = attribute_text(self.attributes or {})
        return {"attributes": text, "levels": self.levels}

    def _targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Targets ``[B, R, attributes]``, and where there are any."""
        targets = jnp.stack([batch[name] for name in self.columns], axis=-1)
        known = jnp.isfinite(targets)
        if self.levels:
            known &= (targets == jnp.round(targets)) & (targets >= 1)
            known &= targets <= self.levels
        return targets, known

    def _votes(self, batch: Batch) -> jax.Array:
        """``[B, R, members, attributes]``."""
        _, known = self._targets(batch)
        seen = self.seen(batch, batch["response_prompt"])
        return answers(batch)[..., None, None] * seen * known[..., None, :]

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        votes = jnp.sum(self._votes(batch))
        return {**super().denominators(batch), "votes": votes}

    def loss(self, params: Params, step: Step) -> LossOutput:
        batch, outputs = step.batch, self.outputs(params, step)
        votes, (targets, known) = self._votes(batch), self._targets(batch)
        goal = jnp.broadcast_to(targets[..., None, :], outputs.shape)
        if self.levels:
            net, own = self.networks()["reward"], {"params": params["reward"]}
            terms = jax.vmap(
                lambda s, y, t, w: losses.score_ordinal(s, y, t, where=w),
                in_axes=(-1, -1, 0, -1),
                out_axes=-1,
            )(outputs, goal - 1.0, net.apply(own, method="thresholds"), votes)
        else:
            terms = losses.score_regression(outputs, goal, where=votes)
        mask, members = answers(batch), jnp.mean(outputs, axis=2)
        metrics = {
            "loss": Mean.of(terms, votes),
            "rewards/mean": Mean.of(jnp.mean(members, -1), mask),
            "targets/left_out": Mean.of(
                jnp.logical_not(known), jnp.broadcast_to(mask[..., None], known.shape)
            ),
        }
        for i, name in enumerate(self.attributes or ("",)):
            where = mask * known[..., i]
            end = f"/{name}" if name else ""
            metrics[f"rewards/correlation{end}"] = Pairs.of(
                losses.masked(members[..., i], where),
                losses.masked(targets[..., i], where),
                where,
            )
        return LossOutput({"votes": jnp.sum(terms * votes)}, metrics)


@dataclasses.dataclass(frozen=True)
class PlackettLuce(RewardObjective):
    """Scores that give a prompt's responses the order of their rewards.

    All responses to a prompt stand beside one encoder row, and the encoder runs once
    for them. Responses of equal reward are not compared; a prompt whose responses all
    are equal is no list.
    """

    schema: ClassVar[str] = "trajectory"
    columns: ClassVar[tuple[str, ...]] = ("response_reward",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read in PAIRWISE:
            raise ValueError(
                f"PlackettLuce.read={self.read!r} compares two responses; a ranking "
                "needs a score of each: take 'response_last'."
            )

    def _better(self, batch: Batch) -> jax.Array:
        """``[B, R, R]``: whether one response is ranked above another."""
        rewards, prompt, real = (
            batch["response_reward"],
            batch["response_prompt"],
            answers(batch) > 0,
        )
        above = rewards[:, :, None] > rewards[:, None, :]
        above &= prompt[:, :, None] == prompt[:, None, :]
        return above & real[:, :, None] & real[:, None, :]

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        ranked = jnp.any(self._better(batch), axis=2)
        prompts = jnp.arange(batch["prompt_mask"].shape[1])
        of_prompt = batch["response_prompt"][:, :, None] == prompts
        lists = jnp.any(ranked[:, :, None] & of_prompt, axis=1).astype(jnp.float32)
        everyone = jnp.broadcast_to(prompts, lists.shape)
        votes = jnp.sum(lists[..., None, None] * self.seen(batch, everyone))
        return {**super().denominators(batch), "votes": votes}

    def loss(self, params: Params, step: Step) -> LossOutput:
        batch, outputs = step.batch, self.outputs(params, step)[..., 0]
        seen = self.seen(batch, batch["response_prompt"])[..., 0]
        votes = answers(batch)[..., None] * seen
        terms = jax.vmap(
            lambda scores, where: losses.plackett_luce(
                scores, batch["response_reward"], batch["response_prompt"], where=where
            ),
            in_axes=-1,
            out_axes=-1,
        )(outputs, votes)
        mean, better = jnp.mean(outputs, axis=-1), self._better(batch)
        ordered = mean[:, :, None] > mean[:, None, :]
        mask = answers(batch)
        found = self.denominators(batch)["votes"]
        metrics = {
            "loss": Mean(jnp.sum(terms), found),
            "rewards/accuracies": Mean.of(ordered, better),
            "rewards/mean": Mean.of(mean, mask),
            "rewards/correlation": Pairs.of(mean, batch["response_reward"], mask),
        }
        return LossOutput({"votes": jnp.sum(terms)}, metrics)
