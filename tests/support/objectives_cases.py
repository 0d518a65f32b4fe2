"""A tiny network and a batch that any objective can use."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax

from jaxalign import batch as batches
from jaxalign import data, models, objectives
from jaxalign.data.plan import Placement, RowShape
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


def make_rows(count: int = NUM_ROWS, seed: int = 0) -> list[data.Row]:
    """Rows with everything known: a pair, rewards and labels."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        tokens = rng.integers(3, CONFIG.vocab_size, rng.integers(low, high))
        return np.append(tokens, 1).astype(np.int32)

    return [
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


def make_batch(rows: list[data.Row], prompts_per_row: int) -> dict[str, np.ndarray]:
    """Lays rows out, so many prompts beside each other, in the given order."""
    n = prompts_per_row
    shape = RowShape(8 * n, 2, 8 * n, prompts=n, responses=2 * n, pairs=n)
    arrays = []
    for start in range(0, len(rows), n):
        part = rows[start : start + n]
        placement = Placement(
            np.arange(start, start + n), np.array([0, 1] * n), inputs=8, targets=8
        )
        arrays.append(data.to_arrays(part, placement, shape))
    return {k: np.stack([a[k] for a in arrays]) for k in arrays[0]}


class Case:
    """One objective with parameters, a different reference policy and a step.

    Compiled functions are kept: tests share them wherever shapes agree.
    """

    def __init__(self, name: str, **settings):
        kind = objectives.OBJECTIVES[name]
        self.objective = kind(model=models.T5(CONFIG), **settings)
        self.params = self.objective.init_params(jax.random.key(1))
        # Sharpened, so that no gradient is negligible.
        self.params = jax.tree.map(lambda x: 1.5 * x, self.params)
        self.reference = models.init_params(models.T5(CONFIG), jax.random.key(2))
        self.tx = optax.sgd(1.0)  # the update is the gradient
        self.key = jax.random.key(3)
        self.rows = make_rows()
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

    def step(self, batch, *, params=None, reference=None, **settings):
        """``(gradients, metrics)`` of one step."""
        state = steps.TrainState.create(params or self.params, self.tx)
        function = self.step_function(**settings)
        new, metrics = function(state, batch, self.key, reference)
        return (
            jax.tree.map(lambda a, b: a - b, state.params, new.params),
            objectives.metrics.summarize([metrics]),
        )


@functools.cache
def get_case(name: str) -> Case:
    return Case(name)


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
    """Metrics within 1e-5 relative, where they are not differences of large numbers."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, rtol=1e-5, atol=2e-5, err_msg=name
        )
