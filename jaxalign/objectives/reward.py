"""Reward models: what they share, and those that learn from preference pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import losses, models
from jaxalign.batch import Batch
from jaxalign.models.reward import PAIRWISE, attribute_text, combine
from jaxalign.objectives.base import LossOutput, Objective, Params, Step, answers
from jaxalign.objectives.metrics import Mean, Metrics, Pairs, Values

# Of pairs that are judged themselves, as `jaxalign preference_strength` writes them.
batches.add_column("pair_smoothing", "BQ", optional=True)
batches.add_column("pair_flip", "BQ", optional=True)


@dataclasses.dataclass(frozen=True)
class RewardObjective(Objective):
    """What reward models share: one network, `models.RewardModel`, and who learns what.

    Every head learns from every label that it sees, and all such *votes* count the
    same: the loss is their mean.

    Attributes:
      read: what a score is read off, see `models.RewardModel`.
      members: heads of an ensemble on one trunk.
      member_share: of the prompts that each member sees, drawn by prompt and member, so
        that members disagree where the data does not decide.
      aggregate: of the members' scores: ``"mean"``, ``"worst"`` or ``"penalised"``.
      penalty: deviations that ``"penalised"`` takes off the mean.
      label: the token of the reads ``"joint_label"`` and ``"pair_label"``.
    """

    read: str = "response_last"
    members: int = 1
    member_share: float = 1.0
    aggregate: str = "mean"
    penalty: float = 1.0
    label: int = -1

    main: ClassVar[str] = "reward"
    standardised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not 0.0 < self.member_share <= 1.0:
            raise ValueError(
                f"{kind}.member_share must lie in (0, 1], got {self.member_share}."
            )
        if self.member_share < 1.0 and self.members == 1:
            raise ValueError(
                f"{kind}.member_share={self.member_share} of a single member: set "
                "members (MEMBERS) to at least 2, or member_share to 1."
            )

    @property
    def network_options(self) -> dict[str, Any]:
        """More of `models.RewardModel`."""
        return {}

    def networks(self) -> dict[str, Any]:
        shared = ("read", "members", "aggregate", "penalty", "label")
        own = {name: getattr(self, name) for name in shared} | self.network_options
        return {"reward": models.RewardModel(config=self.model.config, **own)}

    def outputs(self, params: Params, step: Step) -> jax.Array:
        """Every head's number ``[B, R or Q, members, attributes]``."""
        drops = self.dropout and step.key is not None
        return self.networks()["reward"].apply(
            {"params": params["reward"]},
            step.batch,
            deterministic=not drops,
            rngs={"dropout": step.key} if drops else {},
            method="outputs",
        )

    def scored(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What scores are standardised by: `outputs`, and a mask of its first axes."""
        return self.outputs(params, Step(batch)), answers(batch)

    def seen(self, batch: Batch, prompt: jax.Array) -> jax.Array:
        """``[B, n, members, 1]``: which members see what belongs to these prompts."""
        shape = (*prompt.shape, self.members, 1)
        if self.member_share == 1.0:
            return jnp.ones(shape, jnp.float32)
        ids = jnp.take_along_axis(batch["prompt_id"], jnp.maximum(prompt, 0), axis=1)
        member = jnp.arange(self.members, dtype=jnp.uint32)
        draw = _mixed(_mixed(ids.astype(jnp.uint32))[..., None] + member)
        share = draw.astype(jnp.float32) / 2.0**32
        return (share < self.member_share).astype(jnp.float32)[..., None]


@dataclasses.dataclass(frozen=True)
class BradleyTerry(RewardObjective):
    """Scores whose differences are the log-odds of preferences.

    Attributes:
      margin_scale: weight of the rows' ``margin``, which the difference of scores is to
        exceed.
      centre: weight of ``(s_w + s_l)^2``, which holds scores near 0.
      label_smoothing: assumed probability that a preference is wrong.
      graded: rows may say of each pair how likely it is wrong, ``pair_smoothing`` (in
        place of `label_smoothing` where it is not 0), and that it is taken to be,
        ``pair_flip`` (1, the margin with it).
      attributes: ``{name: weight}`` of several heads, whose weighted sum is the score.
        Rows then say ``pair_<name>``: above 0 where the chosen response has more of
        it, below where the other has, and by how much (times `margin_scale`, the
        margin); 0 or nothing where neither is known to.
    """

    margin_scale: float = 1.0
    centre: float = 0.0
    label_smoothing: float = 0.0
    graded: bool = False
    attributes: Mapping[str, float] | None = None

    schema: ClassVar[str] = "preference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                "BradleyTerry.label_smoothing must lie in [0, 0.5), got "
                f"{self.label_smoothing}."
            )
        if self.centre and self.read in PAIRWISE:
            raise ValueError(
                f"BradleyTerry.read={self.read!r} gives no score to a single response, "
                "so there is nothing to centre: set centre (CENTRE) to 0."
            )
        for name in self.attributes or ():
            add_attribute(f"pair_{name}", "BQ", 0.0)

    @property
    def columns(self) -> tuple[str, ...]:
        graded = ("pair_smoothing", "pair_flip") if self.graded else ()
        return (*graded, *(f"pair_{name}" for name in self.attributes or ()))

    @property
    def network_options(self) -> dict[str, Any]:
        return {"attributes": attribute_text(self.attributes or {})}

    def scored(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        if self.read not in PAIRWISE:
            return super().scored(params, batch)
        found, mask = self.outputs(params, Step(batch)), batch["pair_mask"]
        # Either order is as good as the other.
        return jnp.concatenate([found, -found], 1), jnp.concatenate([mask, mask], 1)

    def _differences(self, batch: Batch) -> jax.Array:
        """``[B, Q, attributes]``: by how much the chosen response is ahead."""
        if not self.attributes:
            return batch["pair_margin"][..., None]
        return jnp.stack([batch[f"pair_{name}"] for name in self.attributes], axis=-1)

    def _votes(self, batch: Batch) -> jax.Array:
        """``[B, Q, members, attributes]``: 1 for every label that a head learns."""
        pick = jnp.take_along_axis
        prompt = pick(batch["response_prompt"], batch["pair_chosen"], axis=1)
        votes = batch["pair_mask"][..., None, None] * self.seen(batch, prompt)
        if self.attributes:
            votes = votes * (self._differences(batch) != 0)[..., None, :]
        return votes

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        votes = jnp.sum(self._votes(batch))
        return {**super().denominators(batch), "votes": votes}

    def loss(self, params: Params, step: Step) -> LossOutput:
        return self.loss_of(step.batch, self.outputs(params, step))

    def loss_of(self, batch: Batch, outputs: jax.Array) -> LossOutput:
        """`loss`, given every head's numbers."""
        votes, ahead = self._votes(batch), self._differences(batch)
        if self.read in PAIRWISE:
            chosen, rejected = outputs, jnp.zeros_like(outputs)
        else:
            chosen, rejected = (
                jnp.take_along_axis(outputs, batch[name][..., None, None], axis=1)
                for name in ("pair_chosen", "pair_rejected")
            )
        like = (*ahead.shape[:2], 1, ahead.shape[2])
        flipped, alpha = jnp.zeros(like, bool), self.label_smoothing
        if self.attributes:
            flipped = ahead.reshape(like) < 0
        if self.graded:
            flipped ^= (batch["pair_flip"] > 0)[..., None, None]
            own = batch["pair_smoothing"][..., None, None]
            alpha = jnp.where(own > 0, own, alpha)
        terms = losses.bradley_terry(
            chosen,
            rejected,
            margin=self.margin_scale * ahead.reshape(like),
            label_smoothing=alpha,
            flipped=flipped,
            where=votes,
        )
        total = terms
        if self.centre:
            total = total + self.centre * losses.centring(chosen, rejected, where=votes)
        metrics = {"loss": Mean.of(terms, votes)}
        metrics |= self._metrics(batch, chosen, rejected)
        return LossOutput({"votes": jnp.sum(total * votes)}, metrics)

    def _metrics(self, batch: Batch, chosen: jax.Array, rejected: jax.Array) -> Metrics:
        """In TRL's spelling; accuracies are without the margin."""
        model, mask = self.networks()["reward"], batch["pair_mask"]
        gap, plain = chosen - rejected, {"how": "mean"}
        margins = combine(model, gap, **plain)
        lengths = batches.select_pairs(batches.response_lengths(batch), batch)
        found = {
            "rewards/margins": Mean.of(margins, mask),
            "rewards/margins/abs": Values.of(jnp.abs(margins), mask),
            "rewards/accuracies": Mean.of(margins > 0, mask),
            "rewards/length_correlation": Pairs.of(
                lengths[0] - lengths[1], margins, mask
            ),
            "lengths/chosen": Mean.of(lengths[0], mask),
            "lengths/rejected": Mean.of(lengths[1], mask),
        }
        if self.read not in PAIRWISE:
            found["rewards/chosen"] = Mean.of(combine(model, chosen, **plain), mask)
            found["rewards/rejected"] = Mean.of(combine(model, rejected, **plain), mask)
        if self.members > 1:
            weights = jnp.asarray(list(model.weights.values()), jnp.float32)
            spread = jnp.std(jnp.sum(gap * weights, axis=-1), axis=-1)
            found["rewards/disagreement"] = Mean.of(spread, mask)
        ahead = self._differences(batch)
        for i, name in enumerate(self.attributes or ()):
            right = jnp.mean(gap[..., i], axis=-1) * ahead[..., i] > 0
            known = mask * (ahead[..., i] != 0)
            found[f"rewards/accuracies/{name}"] = Mean.of(right, known)
        return found


def add_attribute(name: str, axes: str, empty: float) -> None:
    """Adds a column of an attribute; the same one where there is one already."""
    if name not in batches.COLUMNS:
        batches.add_column(name, axes, optional=True, empty=empty)
        return
    known = batches.COLUMNS[name]
    if known.axes != axes or known.source != "rows":
        raise ValueError(
            f"An attribute cannot be called {name.partition('_')[2]!r}: {name} is "
            "another array of the batch."
        )


def _mixed(bits: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby 2011), a hash of 32 bits."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
