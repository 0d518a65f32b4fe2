"""What a training run is made of, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from jaxalign import configs, models, user_code, vocabularies
from jaxalign.batch import Batch
from jaxalign.cluster import distributed
from jaxalign.cluster import mesh as meshes
from jaxalign.models import adapters
from jaxalign.objectives import Objective
from jaxalign.objectives.metrics import Metrics
from jaxalign.training import checkpoints as ckpt
from jaxalign.training import inputs as inputs_lib
from jaxalign.training import sampling
from jaxalign.training import step as steps
from jaxalign.training.partition import Partition

_log = logging.getLogger(__name__)

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
      initial_checkpoint_path: what the objective's main network starts from, such as
        the policy; random if None.
      reference_checkpoint_path: the reference policy; the initial one if None.
      networks: checkpoints that other networks start from, by their names.
      assignment: which parameters come from where in them; see
        `jaxalign.training.partial`.
      adapter: trains beside the objective's main network, which then rests.
      trainable: regular expression over names such as
        ``policy/decoder/layers_0/mlp/wo/kernel``: the parameters that train, beside an
        adapter's; see `jaxalign.training.partition`.
      untrained: likewise, those that do not.
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

    model: models.EncoderDecoder
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
    networks: Mapping[str, str] | None = None
    assignment: Sequence[tuple[str, str | None]] | None = None
    adapter: adapters.Adapter | None = None
    trainable: str | None = None
    untrained: str | None = None
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


def from_gin() -> Run:
    """The run that the parsed gin files describe; says which network it took.

    Raises:
      ConfigError: when none of them describes a run.
    """
    make = configs.configured(Run)
    if make is Run:
        raise configs.ConfigError(
            "No --gin_file describes a run; add one, such as --gin_file=runs/sft.gin: "
            "`jaxalign tasks` lists all."
        )
    run = make()
    if run.initial_checkpoint_path and not configs.is_network_named():
        # Nobody says which network: the checkpoint does.
        path = run.initial_checkpoint_path
        if text := ckpt.network_in_gin(path):
            configs.set_network(text, f"as in {path}")
            run = make()
    _log.info("Network: %s, %s", configs.network(), models.describe(run.model))
    return run


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that is ready to step: what `train` drives and ``--dry_run`` prints."""

    run: Run
    objective: Objective
    inputs: inputs_lib.Inputs
    mesh: jax.sharding.Mesh
    abstract_state: steps.TrainState

    @property
    def networks(self) -> dict[str, Any]:
        """The networks of the train state by name, the reference among them."""
        return _networks(self.run, self.objective)

    @property
    def partition(self) -> Partition:
        """Which parameters train."""
        return _partition(self.run, self.objective)

    @property
    def moving_reference(self) -> steps.MovingReference | None:
        moves = self.objective.uses_reference and self.run.reference == "moving"
        return self.run.moving_reference if moves else None

    @property
    def starts(self) -> dict[str, str]:
        """The checkpoints that networks start from, by name."""
        run = self.run
        found = dict(run.networks or {})
        if run.initial_checkpoint_path:
            found[self.objective.main] = run.initial_checkpoint_path
        if run.reference_checkpoint_path:
            found[steps.REFERENCE] = run.reference_checkpoint_path
        return found

    def init_networks(
        self, key: jax.Array, loaded: Any = None, only: tuple[str, ...] = ()
    ) -> Any:
        """Networks before the first step, made where their shards live.

        Args:
          key: of what is initialised at random.
          loaded: ``{name: parameters}`` of checkpoints, which are given up to these.
          only: names of those wanted; all if empty.

        Returns:
          ``{name: parameters}``.
        """
        like = self.abstract_state.networks
        shardings = jax.tree.map(
            lambda s: s.sharding, {name: like[name] for name in only or like}
        )

        # Compiled as one program: what is initialised only to be replaced, such as a
        # random policy beside a given one, is never computed.
        def create(loaded: Any, key: jax.Array) -> Any:
            made = self.objective.start(self.objective.init_params(key), loaded)
            made[steps.REFERENCE] = loaded.get(steps.REFERENCE, made.get("policy"))
            made = self.partition.with_adapter(made, jax.random.fold_in(key, 1))
            return {name: made[name] for name in shardings}

        with warnings.catch_warnings():
            # Of a trunk that is grafted, only a part is wanted.
            warnings.filterwarnings("ignore", message="Some donated buffers")
            return jax.jit(create, out_shardings=shardings, donate_argnums=0)(
                loaded or {}, jax.random.fold_in(key, _INIT_STREAM)
            )

    def init_state(self, key: jax.Array, loaded: Any = None) -> steps.TrainState:
        """A state before the first step; see `init_networks`."""
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)
        create = jax.jit(
            lambda networks: _create_state(self.run, self.objective, networks),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return create(self.init_networks(key, loaded))

    def in_layout(self, scan_layers: bool) -> Setup:
        """The same run with its layers stacked, or apart."""
        config = dataclasses.replace(self.run.model.config, scan_layers=scan_layers)
        run = dataclasses.replace(self.run, model=self.run.model.clone(config=config))
        objective = run.objective(model=run.model)
        state = abstract_state(run, objective, self.mesh)
        return dataclasses.replace(
            self, run=run, objective=objective, abstract_state=state
        )

    def train_step(self) -> Callable[..., tuple[steps.TrainState, Metrics]]:
        """The compiled training step; it consumes its state."""
        step = steps.make_train_step(
            self.objective,
            self.run.optimizer,
            num_microbatches=self.run.num_microbatches,
            moving_reference=self.moving_reference,
            partition=self.partition,
        )
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)
        return jax.jit(
            meshes.with_activation_rules(self.mesh, step),
            donate_argnums=0,
            out_shardings=(shardings, meshes.replicated(self.mesh)),
        )

    def eval_step(self) -> Callable[[steps.TrainState, Batch], Metrics]:
        """The compiled evaluation step."""
        return jax.jit(
            meshes.with_activation_rules(
                self.mesh, steps.make_eval_step(self.objective, self.partition)
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
    changing = run.dataset.augment or run.dataset.synthetic
    if changing and objective.uses_reference and run.reference == "cached":
        raise ValueError(
            "Dataset.augment and synthetic data make other rows in every epoch, which "
            "cannot be scored before: set REFERENCE='online'."
        )
    steps.check_microbatches(objective, run.num_microbatches)
    _check_names(run, objective)
    _check_partition(run, objective)
    mesh = meshes.named_mesh(run.mesh)
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
    nets, partition = _networks(run, objective), _partition(run, objective)
    shapes = {name: models.shapes(net) for name, net in nets.items()}
    shapes = jax.eval_shape(partition.with_adapter, shapes, jax.random.key(0))
    axes = {name: models.logical_axes(net) for name, net in nets.items()}
    axes = partition.with_axes(axes)
    state = jax.eval_shape(lambda p: _create_state(run, objective, p), shapes)
    params = meshes.param_shardings(mesh, axes, shapes)
    shardings = meshes.shardings_like(shapes, params, state, mesh)
    return jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
        state,
        shardings,
    )


def _networks(run: Run, objective: Objective) -> dict[str, Any]:
    found = objective.networks()
    # An adapter's base is at hand, and is the reference where none is named.
    at_hand = _partition(run, objective).rests_on_base
    at_hand &= not run.reference_checkpoint_path
    if objective.uses_reference and run.reference != "cached" and not at_hand:
        found = {**found, steps.REFERENCE: objective.model}
    return found


def _partition(run: Run, objective: Objective) -> Partition:
    return Partition(
        objective.main, objective.frozen, run.adapter, run.trainable, run.untrained
    )


def _create_state(run: Run, objective: Objective, networks: Any) -> steps.TrainState:
    partition = _partition(run, objective)
    return steps.TrainState.create(networks, run.optimizer, objective, partition)


_ITEMS = ("meta", "rest", "state")  # of checkpoints, beside their networks


def _check_names(run: Run, objective: Objective) -> None:
    """Refuses names of networks that there are not, or that cannot be.

    Raises:
      ValueError: naming the network.
    """
    own = objective.networks()
    kind = type(objective).__name__
    for name in own:
        if name in _ITEMS or name == steps.REFERENCE or not name.isidentifier():
            raise ValueError(
                f"{kind}.networks() has the name {name!r}: expected a word, and none "
                f"of {(*_ITEMS, steps.REFERENCE)}, which checkpoints use."
            )
    for name in (objective.main, *objective.frozen):
        if name not in own:
            raise ValueError(
                f"{kind} names a network {name!r}, of {sorted(own)}."
                f"{user_code.hint(name, own)}"
            )
    for name in run.networks or {}:
        if name not in own or name == objective.main:
            raise ValueError(
                f"NETWORKS has {name!r}: {kind} has the networks {sorted(own)}, of "
                f"which {objective.main!r} starts from INITIAL_CHECKPOINT_PATH."
                f"{user_code.hint(name, own)}"
            )


def _check_partition(run: Run, objective: Objective) -> None:
    """Refuses an adapter and expressions that cannot be.

    Raises:
      ValueError: saying what is wrong.
    """
    partition = _partition(run, objective)
    if partition.whole:
        return
    moving = objective.uses_reference and run.reference == "moving"
    if moving:
        raise ValueError(
            "REFERENCE='moving' is the average of whole policies: it goes with neither "
            "ADAPTER nor TRAINABLE. Set REFERENCE='cached' or 'online'."
        )
    nets = objective.networks()
    shapes = {name: models.shapes(net) for name, net in nets.items()}
    partition.check(shapes, nets)


def in_layout_of(like: Any, tree: Any) -> Any:
    """`models.relayout` onto the devices of `like`; gives up `tree`."""
    shardings = jax.tree.map(lambda s: s.sharding, like)
    change = jax.jit(
        lambda tree: models.relayout(tree, like),
        out_shardings=shardings,
        donate_argnums=0,
    )
    with warnings.catch_warnings():
        # Arrays that are cut or stacked cannot be written in place: nothing is lost.
        warnings.filterwarnings("ignore", message="Some donated buffers")
        return change(tree)
