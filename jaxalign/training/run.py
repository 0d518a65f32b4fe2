"""What a training run is made of, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxalign import models, vocabularies
from jaxalign.batch import Batch
from jaxalign.objectives import Objective
from jaxalign.objectives.metrics import Metrics
from jaxalign.training import checkpoints as ckpt
from jaxalign.training import distributed, sampling
from jaxalign.training import inputs as inputs_lib
from jaxalign.training import mesh as meshes
from jaxalign.training import step as steps

REFERENCES = ("cached", "online", "moving")

# The run's key is folded with a step's number for that step; initialisation takes a
# number no step reaches.
_INIT_STREAM = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a training run is made of; what gin fills in.

    Attributes:
      model: the policy's network.
      objective: makes the objective: ``objective(model=model)``.
      vocabulary: of prompts and responses.
      dataset: what to train on.
      optimizer: any Optax transformation.
      train_steps: steps in all, counted from 0 in a new run.
      run_dir: where everything is written.
      seed: of initialisation, dropout and samples.
      mesh: sizes ``{"data", "fsdp", "tensor"}``; all devices along data by default.
      num_microbatches: pieces each batch is cut into, to save memory.
      initial_checkpoint_path: the policy to start from; random if None.
      reference_checkpoint_path: the reference policy; the initial one if None.
      reference: ``"cached"`` scores the data once, before training; ``"online"`` does
        it in every step; ``"moving"`` does it with a reference that follows the policy.
      moving_reference: how it follows.
      verify_reference: recompute 1 % of a cache that is read, not only of one that is
        made; it loads the reference policy.
      eval_period: steps between evaluations.
      eval_steps: batches of an evaluation; None takes the whole held-out set.
      checkpoint_period: steps between checkpoints.
      keep_checkpoints: how many to keep; None keeps all.
      log_period: steps between log lines.
      sample_period: steps between generated samples; `eval_period` if None.
      sampler: how samples are drawn; None draws none.
      use_wandb: also log to Weights & Biases.
      timeout: seconds that the processes of a job wait for each other, before the first
        step and for a step.
      profile_steps: first and last step to trace; see `jaxalign.training.profiling`.
    """

    model: models.T5
    objective: Callable[..., Objective]
    vocabulary: vocabularies.Vocabulary
    dataset: inputs_lib.Dataset
    optimizer: optax.GradientTransformation
    train_steps: int
    run_dir: str | None = None
    seed: int = 0
    mesh: Mapping[str, int] | None = None
    num_microbatches: int = 1
    initial_checkpoint_path: str | None = None
    reference_checkpoint_path: str | None = None
    reference: str = "cached"
    moving_reference: steps.MovingReference = steps.MovingReference()
    verify_reference: bool = False
    eval_period: int = 1000
    eval_steps: int | None = 20
    checkpoint_period: int = 1000
    keep_checkpoints: int | None = 2
    log_period: int = 10
    sample_period: int | None = None
    sampler: sampling.Sampler | None = None
    use_wandb: bool = False
    timeout: int = 1800
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ValueError(
                f"REFERENCE must be one of {REFERENCES}, got {self.reference!r}."
            )
        for name in ("train_steps", "eval_period", "checkpoint_period", "log_period"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name.upper()} must be at least 1, got {getattr(self, name)}."
                )


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that is ready to step: what `train` drives and ``--dry_run`` prints."""

    run: Run
    objective: Objective
    inputs: inputs_lib.Inputs
    mesh: jax.sharding.Mesh
    abstract_state: steps.TrainState

    @property
    def online_reference(self) -> bool:
        return self.objective.uses_reference and self.run.reference == "online"

    @property
    def moving_reference(self) -> steps.MovingReference | None:
        return _moving_reference(self.run, self.objective)

    def create_state(self, params: Any) -> steps.TrainState:
        """A state before the first step, of given parameters."""
        return _create_state(self.run, self.objective, params)

    def init_state(self, key: jax.Array) -> steps.TrainState:
        """A fresh state of the run with this key, made where its shards live."""
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)

        def create(key: jax.Array) -> steps.TrainState:
            params = self.objective.init_params(key)
            return self.create_state(params)

        return jax.jit(create, out_shardings=shardings)(
            jax.random.fold_in(key, _INIT_STREAM)
        )

    def train_step(self) -> Callable[..., tuple[steps.TrainState, Metrics]]:
        """The compiled training step; it consumes its state."""
        step = steps.make_train_step(
            self.objective,
            self.run.optimizer,
            num_microbatches=self.run.num_microbatches,
            reference_params=self.online_reference,
            moving_reference=self.moving_reference,
        )
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)
        return jax.jit(
            meshes.with_activation_rules(self.mesh, step),
            donate_argnums=0,
            out_shardings=(shardings, meshes.replicated(self.mesh)),
        )

    def eval_step(self) -> Callable[[Any, Batch], Metrics]:
        """The compiled evaluation step."""
        return jax.jit(
            meshes.with_activation_rules(
                self.mesh, steps.make_eval_step(self.objective)
            ),
            out_shardings=meshes.replicated(self.mesh),
        )


def setup(run: Run, reward_stats: tuple[float, float] | None = None) -> Setup:
    """Checks everything that can be checked before compilation; prepares the data.

    Args:
      run: what to train.
      reward_stats: ``(mean, deviation)`` of the rewards, from the checkpoint of a run
        that goes on; None fits them on the training split.
    """
    objective = run.objective(model=run.model)
    mesh = meshes.make_mesh(**(run.mesh or {}))
    meshes.check_batch(mesh, run.dataset.batch_size, run.num_microbatches)
    state = abstract_state(run, objective, mesh)
    inputs = distributed.main_first(
        lambda: inputs_lib.build(run.dataset, objective, run.vocabulary, reward_stats),
        "data",
    )
    return Setup(run, objective, inputs, mesh, state)


def abstract_state(
    run: Run, objective: Objective, mesh: jax.sharding.Mesh
) -> steps.TrainState:
    """The run's train state as shapes, dtypes and shardings; nothing is allocated.

    Raises:
      ValueError: naming the setting, when heads, hidden layer, vocabulary or embedding
        do not divide over the mesh.
    """
    meshes.check_network(mesh, objective.model.config)
    shapes = jax.eval_shape(objective.init_params, jax.random.key(0))
    state = jax.eval_shape(lambda p: _create_state(run, objective, p), shapes)
    params = meshes.param_shardings(mesh, objective.logical_axes(), shapes)
    shardings = meshes.shardings_like(shapes, params, state, mesh)
    return jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
        state,
        shardings,
    )


def _moving_reference(run: Run, objective: Objective) -> steps.MovingReference | None:
    moves = objective.uses_reference and run.reference == "moving"
    return run.moving_reference if moves else None


def _create_state(run: Run, objective: Objective, params: Any) -> steps.TrainState:
    return steps.TrainState.create(
        params, run.optimizer, objective, _moving_reference(run, objective)
    )


def load_policy(path: str, ready: Setup) -> ckpt.Policy:
    """Loads a policy onto the run's mesh, if it is the same network."""
    expected = dataclasses.asdict(ready.objective.model.config)
    found = ckpt.read_meta(path)
    differing = {
        k: (found["model"].get(k), v)
        for k, v in expected.items()
        if k in _SHAPING and _plain(found["model"].get(k)) != _plain(v)
    }
    if differing:
        raise ValueError(
            f"{path} holds another network. "
            + "; ".join(
                f"{name}: checkpoint {theirs!r}, MODEL {ours!r}"
                for name, (theirs, ours) in differing.items()
            )
        )
    if found["vocabulary"] != ready.inputs.vocabulary.to_json():
        raise ValueError(
            f"{path} was trained with the vocabulary {found['vocabulary']}, VOCABULARY "
            f"is {ready.inputs.vocabulary.to_json()}: use the checkpoint's."
        )
    shardings = jax.tree.map(
        lambda s: s.sharding, ready.abstract_state.params["policy"]
    )
    return ckpt.load_policy(path, shardings)


# The settings that decide which function the parameters compute.
_SHAPING = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "mlp_activations",
    "logits_via_embedding",
    "scan_layers",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def reference_policy(
    path: str | None, ready: Setup, key: jax.Array
) -> tuple[str, Callable[[], Any]]:
    """The reference policy's fingerprint, and how to load it."""
    if path:
        fingerprint = ckpt.read_meta(path)["policy_fingerprint"]
        return fingerprint, lambda: load_policy(path, ready).params
    state = ready.init_state(key)
    policy = state.params["policy"]
    return ckpt.params_fingerprint(policy), lambda: policy
