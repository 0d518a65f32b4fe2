"""What a training run is made of, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxalign import configs, models, vocabularies
from jaxalign.batch import Batch
from jaxalign.cluster import distributed
from jaxalign.cluster import mesh as meshes
from jaxalign.objectives import Objective
from jaxalign.objectives.metrics import Metrics
from jaxalign.training import checkpoints as ckpt
from jaxalign.training import inputs as inputs_lib
from jaxalign.training import sampling
from jaxalign.training import step as steps

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
    def online_reference(self) -> bool:
        return self.objective.uses_reference and self.run.reference == "online"

    @property
    def moving_reference(self) -> steps.MovingReference | None:
        return _moving_reference(self.run, self.objective)

    @property
    def policy_shardings(self) -> Any:
        """Where the policy's parameters live."""
        policy = self.abstract_state.params["policy"]
        return jax.tree.map(lambda s: s.sharding, policy)

    def create_state(self, params: Any) -> steps.TrainState:
        """A state before the first step, of given parameters."""
        return _create_state(self.run, self.objective, params)

    def init_state(
        self, key: jax.Array, policy: Any = None, reference: Any = None
    ) -> steps.TrainState:
        """A state before the first step, made where its shards live.

        Args:
          key: of what is initialised at random.
          policy: parameters to start from, which are given up to the state; random if
            None. Of an objective's other networks, and of the optimizer's state, all
            that depends on the policy is made from these.
          reference: where a moving reference starts; a copy of the policy if None.
        """
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)

        # Compiled as one program: what is initialised only to be replaced, such as a
        # random policy beside a given one, is never computed.
        def create(policy: Any, key: jax.Array, reference: Any) -> steps.TrainState:
            params = self.objective.init_params(key)
            if policy is not None:
                params = self.objective.start_from(params, policy)
            state = self.create_state(params)
            if reference is not None:
                carried = {**state.carried, "reference": {"policy": reference}}
                state = dataclasses.replace(state, carried=carried)
            return state

        return jax.jit(create, out_shardings=shardings, donate_argnums=(0, 2))(
            policy, jax.random.fold_in(key, _INIT_STREAM), reference
        )

    def init_policy(self, key: jax.Array) -> Any:
        """The policy's parameters of `init_state`, without the rest of a state."""

        def create(key: jax.Array) -> Any:
            return self.objective.init_params(key)["policy"]

        return jax.jit(create, out_shardings=self.policy_shardings)(
            jax.random.fold_in(key, _INIT_STREAM)
        )

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
    changing = run.dataset.augment or run.dataset.synthetic
    if changing and objective.uses_reference and run.reference == "cached":
        raise ValueError(
            "Dataset.augment and synthetic data make other rows in every epoch, which "
            "cannot be scored before: set REFERENCE='online'."
        )
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
    """Loads a policy onto the run's mesh and in its layout, if it is the same network.

    Raises:
      ValueError: naming what differs: a field of the architecture, or the vocabulary.
    """
    found = ckpt.read_meta(path)
    # Dropout changes no parameter's meaning, and is off when a reference is there.
    ours = ready.run.model.config.architecture()
    differing = {
        name: (found["model"].get(name), value)
        for name, value in ours.items()
        if name != "dropout_rate" and found["model"].get(name) != value
    }
    if differing:
        raise ValueError(
            f"{path} holds another network. "
            + "; ".join(
                f"{name}: checkpoint {theirs!r}, MODEL {ours!r}"
                for name, (theirs, ours) in differing.items()
            )
        )
    _check_vocabulary(path, found, ready.run.vocabulary)
    own = ready.run.model.config.scan_layers
    stored = ckpt.stored_model(found).config.scan_layers
    if stored == own:
        return ckpt.load_policy(path, ready.policy_shardings)
    policy = ckpt.load_policy(path, ready.in_layout(stored).policy_shardings)
    like = ready.abstract_state.params["policy"]
    return dataclasses.replace(
        policy, model=ready.run.model, params=in_layout_of(like, policy.params)
    )


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


def _check_vocabulary(
    path: str, meta: Mapping[str, Any], vocabulary: vocabularies.Vocabulary
) -> None:
    """Refuses a checkpoint whose ids mean other text."""
    theirs = meta.get("vocabulary_fingerprint")
    if theirs is None:  # an older checkpoint: from the model file beside it
        folder = ckpt.resolve(path).parents[1]
        theirs = vocabularies.from_json(meta["vocabulary"], folder).fingerprint
    if theirs != vocabulary.fingerprint:
        raise ValueError(
            f"{path} was trained with another vocabulary: {meta['vocabulary']} with "
            f"the fingerprint {theirs[:12]}; VOCABULARY is {vocabulary!r} with "
            f"{vocabulary.fingerprint[:12]}. Use the checkpoint's, "
            f"{vocabularies.MODEL_FILE} in its run directory."
        )


def run_parents(ready: Setup, saved: Mapping[str, Any] | None) -> dict[str, str | None]:
    """Fingerprints of the policies that a run begins with: ``initial``, ``reference``.

    Args:
      ready: the run.
      saved: the ``meta`` of the checkpoint that it goes on from, if it does.

    Returns:
      By content, not by path. None stands for one made from the run's seed; there is a
      ``reference`` only where the objective has one.
    """
    run = ready.run
    found = {"initial": _content(run.initial_checkpoint_path, saved, "initial")}
    if ready.objective.uses_reference:
        path = run.reference_checkpoint_path
        found["reference"] = (
            _content(path, saved, "reference") if path else found["initial"]
        )
        if found["reference"] is None and saved:
            found["reference"] = saved["parents"].get("reference")
    return found


def _content(
    path: str | None, saved: Mapping[str, Any] | None, name: str
) -> str | None:
    """The fingerprint of the policy at a path."""
    if not path:
        return None
    try:
        return ckpt.read_meta(path)["policy_fingerprint"]
    except FileNotFoundError:
        if saved is None or saved["parents"].get(name) is None:
            raise
        # A run that goes on may do without what it began with.
        _log.warning(
            "The %s checkpoint %s is gone: that the run began with it is not checked.",
            name,
            path,
        )
        return saved["parents"][name]


def reference_policy(
    ready: Setup,
    key: jax.Array,
    parents: Mapping[str, str | None],
    beginning: steps.TrainState | None,
) -> tuple[str, Callable[[], Any]]:
    """The reference policy's fingerprint, and how to get its parameters.

    Args:
      ready: the run.
      key: the run's.
      parents: of `run_parents`.
      beginning: the run's state if it is the one before the first step. Where it holds
        the reference already, nothing is loaded.
    """
    run = ready.run
    path = run.reference_checkpoint_path or run.initial_checkpoint_path
    same = not path or parents["initial"] == parents["reference"]
    if beginning is not None and same:
        policy = beginning.params["policy"]
        fingerprint = parents["reference"] or ckpt.params_fingerprint(policy)
        return fingerprint, lambda: policy
    if path:
        return parents["reference"], lambda: load_policy(path, ready).params

    def again() -> Any:
        policy = ready.init_policy(key)
        if ckpt.params_fingerprint(policy) != parents["reference"]:
            raise ValueError(
                "The reference of this run is the policy that its seed gave, and this "
                "version of jax gives another: go on with the version in manifest.json."
            )
        return policy

    return parents["reference"], again
