"""A tiny network and a batch that any objective can use."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import batch as batches
from jaxalign import data, models, objectives
from jaxalign.data.plan import Placement, RowShape
from jaxalign.models.layers import Embed
from jaxalign.training import step as steps

CONFIG = models.T5Config(
    vocab_size=48,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
NUM_ROWS = 16


class BagOfTokens(models.T5):
    """A network that compiles in no time: the last token and the prompt's mean.

    What an objective does around its network is the same for any network; this one
    stands in for T5 where T5 itself is covered by an objective of the same structure.
    """

    def setup(self):
        self.token_embedder = Embed(self.config)
        self.kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(
                nn.initializers.normal(1.0), ("embed", "vocab")
            ),
            (self.config.emb_dim, self.config.vocab_size),
        )

    def encode(self, tokens, segments, *, deterministic=True):
        return self.token_embedder(tokens)

    def decode(
        self, encoded, of_encoder, tokens, segments, asked, *, deterministic=True
    ):
        seen = (asked[..., None] == of_encoder[:, None, None, :]).astype(jnp.float32)
        seen /= jnp.maximum(jnp.sum(seen, axis=-1, keepdims=True), 1.0)
        prompt = jnp.einsum("bkdl,ble->bkde", seen, encoded)
        return jnp.tanh(self.token_embedder(tokens) + prompt)

    def head(self, states):
        return states, self.kernel


def make_rows(
    count: int = NUM_ROWS, seed: int = 0, rationales: bool = False
) -> list[data.Row]:
    """Rows with everything known: a pair, rewards and labels, and why on request."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        tokens = rng.integers(3, CONFIG.vocab_size, rng.integers(low, high))
        return np.append(tokens, 1).astype(np.int32)

    rows = [
        data.Row(
            key=str(i),
            prompts=[ids(2, 7)],
            responses=[ids(1, 7), ids(1, 7)],
            response_prompt=[0, 0],
            response_kind=[batches.ANSWER] * 2,
            response_reward=[float(r) for r in rng.normal(size=2)],
            response_label=[int(x) for x in rng.integers(0, 2, 2)],
            pairs=[(0, 1, 0.0)],
        )
        for i in range(count)
    ]
    if rationales:
        for row in rows:
            row.prompts.append(ids(2, 7))
            row.responses.append(ids(1, 7))
            row.response_prompt.append(1)
            row.response_kind.append(batches.RATIONALE)
            row.response_reward.append(float("nan"))
            row.response_label.append(batches.NO_LABEL)
    return rows


def make_batch(rows: list[data.Row], prompts_per_row: int) -> dict[str, np.ndarray]:
    """Lays rows out, so many prompts beside each other, in the given order."""
    n = prompts_per_row
    p, r = len(rows[0].prompts), len(rows[0].responses)
    pairs = max(len(row.pairs) for row in rows)
    length = 8 * n * max(p, -(-r // 2))  # of responses in two decoder rows
    shape = RowShape(8 * n * p, 2, length, n * p, n * r, n * pairs)
    arrays = []
    for start in range(0, len(rows), n):
        part = rows[start : start + n]
        placement = Placement(
            np.arange(start, start + n), np.arange(n * r) % r % 2, inputs=8, targets=8
        )
        columns = {
            name: [value for row in part for value in row.columns[name]]
            for name in part[0].columns
        }
        arrays.append(data.to_arrays(part, placement, shape, columns))
    return {k: np.stack([a[k] for a in arrays]) for k in arrays[0]}


class Case:
    """One objective with parameters, a different reference policy and a step.

    Compiled functions are kept: tests share them wherever shapes agree.
    """

    def __init__(self, name: str, network: type[models.T5] = models.T5, **settings):
        kind = objectives.OBJECTIVES[name]
        self.objective = kind(model=network(CONFIG), **settings)
        self.params = self.objective.init_params(jax.random.key(1))
        # Sharpened, so that no gradient is negligible.
        self.params = jax.tree.map(lambda x: 1.5 * x, self.params)
        self.reference = models.init_params(network(CONFIG), jax.random.key(2))
        self.tx = optax.sgd(1.0)  # the update is the gradient
        self.key = jax.random.key(3)
        self.rows = make_rows(rationales=self.objective.schema == "rationale")
        if "pair_samples" in self.objective.columns:  # every other pair is of samples
            for i, row in enumerate(self.rows):
                row.columns["pair_samples"] = [2.0 * (i % 2)]
        self._score = jax.jit(
            lambda p, b: objectives.reference_columns(
                self.objective.model, p, b, mismatched=self.objective.uses_mismatched
            )
        )

    @functools.cache  # noqa: B019 - cases live as long as the tests
    def step_function(self, **settings):
        return jax.jit(steps.make_train_step(self.objective, self.tx, **settings))

    def with_reference(self, batch):
        if not self.objective.uses_reference:
            return batch
        return {**batch, **jax.device_get(self._score(self.reference, batch))}

    def state(self, params=None, reference=None):
        networks = dict(params or self.params)
        if reference is not None:
            networks["reference"] = reference
        return steps.TrainState.create(networks, self.tx, self.objective)

    def step(self, batch, *, params=None, reference=None, **settings):
        """``(gradients, metrics)`` of one step."""
        state = self.state(params, reference)
        function = self.step_function(**settings)
        new, metrics = function(state, batch, self.key)
        return (
            jax.tree.map(lambda a, b: a - b, state.params, new.params),
            objectives.metrics.summarize([metrics]),
        )


@functools.cache
def get_case(name: str, network: type[models.T5] = models.T5, **settings) -> Case:
    return Case(name, network, **settings)


def assert_same_gradients(found, expected):
    """Gradients within 1e-4 of their leaf's largest entry, in float32."""
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(expected))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(expected),
        strict=True,
    ):
        # Gradients are read off as differences of parameters of order 1.
        bound = 1e-4 * max(float(abs(b).max()), 1e-3 * largest) + 1e-6
        worst = float(abs(np.asarray(a) - np.asarray(b)).max())
        assert worst <= bound, (jax.tree_util.keystr(path), worst, bound)


def assert_same_metrics(found, expected):
    """Metrics within 1e-5 relative, where they are not differences of large numbers.

    Norms of gradients have the gradients' bound: one unit in the last place of the
    parameters moves RewardKTO's by as much as 1.3e-4.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The optimizer is plain SGD at rate 1: the update is the gradient.
        is_norm = "grad_norm" in name or name == "update_norm"
        rtol = 1e-4 if is_norm else 1e-5
        np.testing.assert_allclose(
            found[name], value, rtol=rtol, atol=2e-5, err_msg=name
        )
