"""Reward models: a T5 that gives numbers to responses, or to pairs of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.batch import Batch, prompt_of_tokens, sum_by_response
from jaxalign.losses.scores import AGGREGATES, aggregate
from jaxalign.models import joint, soft_prompt
from jaxalign.models.config import T5Config
from jaxalign.models.heads import AffineHead
from jaxalign.models.layers import Embed
from jaxalign.models.networks import register
from jaxalign.models.stacks import Decoder, Encoder

READS = ("response_last", "response_mean", "joint_mean", "joint_label")
PAIRWISE = ("pair_mean", "pair_label")


@register
class RewardModel(nn.Module):
    """Scores of responses ``r(x, y)``, by one head or several on one trunk.

    The trunk's parameters have the names they have in `T5`, so that it starts from a
    policy by `models.graft`.

    Attributes:
      config: the network's.
      read: what a score is read off. ``"response_last"``: the decoder's state that
        predicts a response's last token, EOS unless it was cut; the encoder runs once
        for all responses to a prompt. ``"response_mean"``: the mean over a response's
        decoder states. ``"joint_mean"``: the mean encoder state of ``prompt EOS
        response EOS``. ``"joint_label"``: the decoder reads that, and the score is the
        logit of one token at its first step. ``"pair_mean"``, ``"pair_label"``: the
        same of ``prompt EOS a EOS b EOS``, half its difference to the other order, so
        that exchanging ``a`` and ``b`` changes the sign and nothing else.
      members: heads of an ensemble.
      attributes: what each member scores, ``"helpfulness=0.65,verbosity=-0.2"``, with
        weights in the sum that is a response's score; empty: one thing without a name.
      label: the token of ``"joint_label"`` and ``"pair_label"``.
      levels: of a Likert scale; the thresholds between them are parameters.
      prototypes: directions among the features, parameters of a contrastive loss.
      aggregate: of the members' scores, see `jaxalign.losses.aggregate`.
      penalty: of ``"penalised"``.
    """

    config: T5Config
    read: str = "response_last"
    members: int = 1
    attributes: str = ""
    label: int = -1
    levels: int = 0
    prototypes: int = 0
    aggregate: str = "mean"
    penalty: float = 1.0

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each attribute by name; ``{"": 1.0}`` for one without."""
        return attribute_weights(self.attributes)

    @property
    def pairwise(self) -> bool:
        """Whether it compares two responses and scores none."""
        return self.read in PAIRWISE

    def setup(self):
        self._check()
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)
        if not self.read.endswith("_mean") or self.read == "response_mean":
            self.decoder = Decoder(self.config)
        if not self.read.endswith("_label"):
            self.reward_head = AffineHead(self.members * len(self.weights))
        if self.levels:
            self.steps = self.param(
                "threshold_steps",
                nn.with_logical_partitioning(_equal_steps, ("scalar", "scalar_2")),
                (len(self.weights), self.levels - 1),
                jnp.float32,
            )
        if self.prototypes:
            self.directions = self.param(
                "prototypes",
                nn.with_logical_partitioning(
                    nn.initializers.normal(1.0), ("scalar", "embed")
                ),
                (self.prototypes, self.config.emb_dim),
                jnp.float32,
            )

    def _check(self) -> None:
        if self.read not in READS + PAIRWISE:
            raise ValueError(
                f"RewardModel.read must be one of {READS + PAIRWISE}, got "
                f"{self.read!r}."
            )
        if self.aggregate not in AGGREGATES:
            raise ValueError(
                f"RewardModel.aggregate must be one of {AGGREGATES}, got "
                f"{self.aggregate!r}."
            )
        if self.members < 1 or self.levels < 0 or self.levels == 1:
            raise ValueError(
                "RewardModel needs members >= 1 and no levels or at least 2, got "
                f"{self.members} and {self.levels}."
            )
        if self.read.endswith("_label"):
            if not 0 <= self.label < self.config.vocab_size:
                raise ValueError(
                    f"RewardModel.read={self.read!r} reads the logit of one token: "
                    f"label must be an id in [0, {self.config.vocab_size}), got "
                    f"{self.label}."
                )
            if self.members > 1 or self.attributes:
                raise ValueError(
                    f"RewardModel.read={self.read!r} has one number, that of its "
                    "label: members must be 1 and attributes empty."
                )

    def __call__(self, batch: Batch, *, deterministic: bool = True) -> jax.Array:
        """One number each, as trained: `outputs` in one sum, not standardised.

        Returns:
          Float32 ``[B, R]``, or ``[B, Q]`` of a pairwise one: by how much the chosen
          response is preferred; 0 where there is none.
        """
        return combine(self, self.outputs(batch, deterministic=deterministic))

    def outputs(self, batch: Batch, *, deterministic: bool = True) -> jax.Array:
        """Every head's number: float32 ``[B, R or Q, members, attributes]``."""
        if self.pairwise:
            ways = [
                self._joint(*joint.with_pair(batch, swapped), deterministic)
                for swapped in (False, True)
            ]
            found = (ways[0] - ways[1]) / 2.0
        elif self.read.startswith("joint_"):
            found = self._joint(*joint.with_response(batch), deterministic)
        else:
            found = self._of_decoder(batch, deterministic)
        return found.reshape(*found.shape[:2], self.members, len(self.weights))

    def features(self, batch: Batch, *, deterministic: bool = True) -> jax.Array:
        """What a response's score is read off: float32 ``[B, R, E]``.

        Zeros where there is no response; a network that compares has none.
        """
        if self.read.startswith("joint_"):
            return self._joint_features(*joint.with_response(batch), deterministic)
        states, kept = self._decoded(batch, deterministic)
        return self._by_response(states, kept, batch)

    def heads(self, features: jax.Array) -> jax.Array:
        """`outputs` of features, where there is a response."""
        values = self._values(features)
        return values.reshape(*features.shape[:2], self.members, len(self.weights))

    def thresholds(self) -> jax.Array:
        """Ascending thresholds between levels, ``[attributes, levels - 1]``."""
        first, steps = self.steps[:, :1], nn.softplus(self.steps[:, 1:])
        return jnp.concatenate([first, first + jnp.cumsum(steps, axis=1)], axis=1)

    def _of_decoder(self, batch: Batch, deterministic: bool) -> jax.Array:
        states, kept = self._decoded(batch, deterministic)
        # The head is affine, and of few numbers: first the head, then the mean.
        return self._by_response(self.reward_head(states), kept, batch)

    def _decoded(
        self, batch: Batch, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """States ``[B, K, Ld, E]``, and which of them a response's mean is of."""
        of_encoder = batch["encoder_segment_ids"]
        encoded = soft_prompt.encode(
            self.token_embedder,
            self.encoder,
            batch["encoder_input_tokens"],
            of_encoder,
            batch["prompt_mask"].shape[1],
            deterministic,
        )
        segments = batch["decoder_segment_ids"]
        states = self.decoder(
            self.token_embedder(batch["decoder_input_tokens"]),
            encoded,
            segments,
            prompt_of_tokens(segments, batch["response_prompt"]),
            soft_prompt.segments(self.token_embedder, of_encoder, encoded.shape[1]),
            deterministic,
        )
        following = jnp.pad(segments[..., 1:], ((0, 0), (0, 0), (0, 1)))
        kept = segments != following
        if self.read == "response_mean":
            kept = jnp.ones_like(kept)
        return states, kept

    def _by_response(
        self, values: jax.Array, kept: jax.Array, batch: Batch
    ) -> jax.Array:
        """Means ``[B, R, n]`` of tokens' ``[B, K, Ld, n]``; 0 of no response."""
        segments, size = batch["decoder_segment_ids"], batch["response_mask"].shape[1]
        count = sum_by_response(kept.astype(jnp.float32), segments, size)
        summed = jax.vmap(
            lambda v: sum_by_response(jnp.where(kept, v, 0.0), segments, size), -1, -1
        )(values)
        return summed / jnp.maximum(count, 1.0)[..., None]

    def _joint(
        self, tokens: jax.Array, segments: jax.Array, deterministic: bool
    ) -> jax.Array:
        """Of rows ``[B, n, L]``; 0 where one is empty."""
        features = self._joint_features(tokens, segments, deterministic)
        real = segments[..., :1] > 0
        return jnp.where(real, self._values(features), 0.0)

    def _joint_features(
        self, tokens: jax.Array, segments: jax.Array, deterministic: bool
    ) -> jax.Array:
        """``[B, n, E]`` of rows ``[B, n, L]``; 0 where one is empty."""
        shape, length = tokens.shape[:2], tokens.shape[-1]
        tokens, segments = (x.reshape(-1, length) for x in (tokens, segments))
        encoded = soft_prompt.encode(
            self.token_embedder, self.encoder, tokens, segments, 1, deterministic
        )
        real = segments[:, :1] > 0
        if self.read.endswith("_mean"):
            member = segments[..., None].astype(jnp.float32)
            states = encoded[:, :length].astype(jnp.float32)
            total = jnp.sum(states * member, axis=1)
            features = total / jnp.maximum(jnp.sum(member, 1), 1.0)
        else:
            first = segments[:, None, :1]
            states = self.decoder(
                self.token_embedder(jnp.zeros_like(first)),
                encoded,
                first,
                first,
                soft_prompt.segments(self.token_embedder, segments, encoded.shape[1]),
                deterministic,
            )
            features = states[:, 0, 0].astype(jnp.float32)
        return jnp.where(real, features, 0.0).reshape(*shape, -1)

    def _values(self, features: jax.Array) -> jax.Array:
        """What is read off features: ``[..., heads]``."""
        read = self._logit if self.read.endswith("_label") else self.reward_head
        return read(features)

    def _logit(self, states: jax.Array) -> jax.Array:
        """``[..., 1]``: the label's logit, as `T5` computes it."""
        if self.config.logits_via_embedding:
            scale = 1.0 / math.sqrt(self.config.emb_dim)
            kernel = self.token_embedder.embedding.T * scale
        else:
            kernel = self.decoder.logits_dense()
        column = kernel[:, self.label, None]
        return states.astype(jnp.float32) @ column.astype(jnp.float32)


def attribute_weights(text: str) -> dict[str, float]:
    """The weights in ``"helpfulness=0.65,verbosity=-0.2"`` by name.

    Raises:
      ValueError: for what is no such text.

    >>> attribute_weights("helpfulness=0.65,verbosity=-0.2")
    {'helpfulness': 0.65, 'verbosity': -0.2}
    """
    if not text:
        return {"": 1.0}
    found = {}
    for part in text.split(","):
        name, equals, weight = part.partition("=")
        try:
            value = float(weight) if equals else math.nan
        except ValueError:
            value = math.nan
        if not name.isidentifier() or name in found or not math.isfinite(value):
            raise ValueError(
                f"attributes must be name=weight, each once, between commas; got "
                f"{part!r} in {text!r}."
            )
        found[name] = value
    return found


def attribute_text(weights: Mapping[str, float]) -> str:
    """The inverse of `attribute_weights`."""
    text = ",".join(f"{name}={float(weight)!r}" for name, weight in weights.items())
    attribute_weights(text)
    return text


def combine(
    model: RewardModel,
    outputs: Any,
    standard: Mapping[str, Any] | None = None,
    *,
    how: str | None = None,
    penalty: float | None = None,
) -> Any:
    """One number of every head's: attributes by their weights, members aggregated.

    Args:
      model: the network.
      outputs: of it, ``[..., members, attributes]``.
      standard: ``{"mean", "deviation"}``, ``[members, attributes]`` each, of what a
        checkpoint's scores are standardised by. Members are comparable only then: the
        losses of pairs leave the offset of each open.
      how, penalty: in place of the network's own `aggregate` and `penalty`.

    Returns:
      ``[...]``.
    """
    if standard is not None:
        mean, deviation = (jnp.asarray(standard[n]) for n in ("mean", "deviation"))
        outputs = (outputs - mean) / deviation
    weights = jnp.asarray(list(model.weights.values()), jnp.float32)
    scores = jnp.sum(outputs * weights, axis=-1)
    penalty = model.penalty if penalty is None else penalty
    return aggregate(scores, how or model.aggregate, penalty=penalty)


def _equal_steps(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Thresholds one apart, about 0, before `RewardModel.thresholds`."""
    del key
    inner = shape[1] - 1
    first = jnp.full((shape[0], 1), -inner / 2.0, dtype)
    step = math.log(math.expm1(1.0))  # softplus of it is 1
    return jnp.concatenate([first, jnp.full((shape[0], inner), step, dtype)], axis=1)
