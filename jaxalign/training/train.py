"""The training loop: one function, in numbered phases, readable in one sitting."""

from __future__ import annotations

import dataclasses
import functools
import logging
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import optax

from jaxalign import models, vocabularies
from jaxalign.objectives import Objective
from jaxalign.objectives.metrics import Metrics, summarize
from jaxalign.training import checkpoints as ckpt
from jaxalign.training import inputs as inputs_lib
from jaxalign.training import mesh as meshes
from jaxalign.training import (
    optimizers,
    reference_cache,
    run_directory,
    sampling,
)
from jaxalign.training import step as steps
from jaxalign.training.metric_writers import MetricWriter, Progress

_log = logging.getLogger(__name__)

# The run's key is folded with a step's number for that step; initialisation takes a
# number no step reaches.
_INIT_STREAM = 2**31 - 1


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


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
        it in every step.
      eval_period: steps between evaluations.
      eval_steps: batches of an evaluation; None takes the whole held-out set.
      checkpoint_period: steps between checkpoints.
      keep_checkpoints: how many to keep; None keeps all.
      log_period: steps between log lines.
      sample_period: steps between generated samples; `eval_period` if None.
      sampler: how samples are drawn; None draws none.
      use_wandb: also log to Weights & Biases.
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
    eval_period: int = 1000
    eval_steps: int | None = 20
    checkpoint_period: int = 1000
    keep_checkpoints: int | None = 2
    log_period: int = 10
    sample_period: int | None = None
    sampler: sampling.Sampler | None = None
    use_wandb: bool = False

    def __post_init__(self) -> None:
        if self.reference not in ("cached", "online"):
            raise ValueError(
                f"REFERENCE must be 'cached' or 'online', got {self.reference!r}."
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

    def init_state(self, key: jax.Array) -> steps.TrainState:
        """A fresh state, initialised where its shards live."""
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)

        def create(key: jax.Array) -> steps.TrainState:
            params = self.objective.init_params(key)
            return steps.TrainState.create(params, self.run.optimizer)

        return jax.jit(create, out_shardings=shardings)(key)

    def train_step(self) -> Callable[..., tuple[steps.TrainState, Metrics]]:
        """The compiled training step; it consumes its state."""
        step = steps.make_train_step(
            self.objective,
            self.run.optimizer,
            num_microbatches=self.run.num_microbatches,
            reference_params=self.online_reference,
        )
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state)
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, meshes.replicated(self.mesh)),
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
    inputs = inputs_lib.build(run.dataset, objective, run.vocabulary, reward_stats)
    shapes = jax.eval_shape(objective.init_params, jax.random.key(0))
    state = jax.eval_shape(lambda p: steps.TrainState.create(p, run.optimizer), shapes)
    params = meshes.param_shardings(mesh, objective.logical_axes(), shapes)
    shardings = meshes.shardings_like(shapes, params, state, mesh)
    return Setup(
        run=run,
        objective=objective,
        inputs=inputs,
        mesh=mesh,
        abstract_state=jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
            state,
            shardings,
        ),
    )


def train(run: Run, config_text: str = "") -> dict[str, float]:
    """Trains until ``run.train_steps``, or goes on where a killed run stopped.

    The batch of step ``s`` is a pure function of (data, seed, ``s``) and so is its
    random key: a run that was killed and restarted by the same command ends with the
    bits of one that was not.

    Args:
      run: what to train.
      config_text: the full gin configuration, written to ``config.gin``.

    Returns:
      The last logged metrics.

    Raises:
      ValueError: for settings or data that cannot work, before compilation.
      NonFiniteLossError: naming the step; the batch is saved in the run directory, and
        the last good checkpoint is intact.
    """
    # ---- 1. What this run is --------------------------------------------------------
    if not run.run_dir:
        raise ValueError("Say where to write: --run_dir=DIR.")
    run_dir = Path(run.run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    main_process = jax.process_index() == 0
    checkpoints = ckpt.Checkpoints(run_dir, keep=run.keep_checkpoints)
    saved = ckpt.read_meta(run_dir) if checkpoints.steps() else {}

    # ---- 2. Data, objective, mesh: every check that needs no compiler ---------------
    stats = saved.get("reward_stats")
    ready = setup(run, reward_stats=tuple(stats) if stats else None)
    dataset = run.dataset
    feed = ready.inputs.train
    rows = meshes.process_rows(dataset.batch_size)

    # ---- 3. State: this run's checkpoint, else the initial policy, else random ------
    key = jax.random.key(run.seed)
    restored = checkpoints.restore(ready.abstract_state)
    start_policy = None
    if run.initial_checkpoint_path and not restored:
        start_policy = _load_policy(run.initial_checkpoint_path, ready)
    if restored:
        state, saved = restored
        _check_resumable(saved, feed, run)
        parents = saved["parents"]
        _log.info("Resumed %s at step %d", run_dir, int(state.step))
    else:
        state = ready.init_state(jax.random.fold_in(key, _INIT_STREAM))
        if start_policy is not None:
            params = ready.objective.start_from(state.params, start_policy.params)
            state = dataclasses.replace(state, params=params)
        parents = {
            "initial": start_policy.meta["policy_fingerprint"] if start_policy else None
        }

    # ---- 4. The reference policy's log-probabilities --------------------------------
    frozen = None
    if ready.objective.uses_reference:
        source = run.reference_checkpoint_path or run.initial_checkpoint_path
        ref_fingerprint, load = _reference_policy(source, ready, key)
        parents["reference"] = ref_fingerprint
        if ready.online_reference:
            frozen = load()
        eval_feed = ready.inputs.evaluation
        join = functools.partial(
            reference_cache.join,
            objective=ready.objective,
            policy_fingerprint=ref_fingerprint,
            load_params=load,
            cache_dir=dataset.cache_folder,
            mesh=ready.mesh,
        )
        if not ready.online_reference:
            feed = join(feed)
        if eval_feed is not None:
            eval_feed = join(eval_feed)
        ready = dataclasses.replace(
            ready,
            inputs=dataclasses.replace(ready.inputs, train=feed, evaluation=eval_feed),
        )

    # ---- 5. What is written, and by whom --------------------------------------------
    meta = {
        "format": 1,
        "objective": type(ready.objective).__name__,
        "model": dataclasses.asdict(run.model.config),
        "vocabulary": run.vocabulary.to_json(),
        "seed": run.seed,
        "batch_size": dataset.batch_size,
        "data_fingerprint": feed.fingerprint,
        "feature_lengths": dict(dataset.feature_lengths),
        "reward_stats": ready.inputs.reward_stats,
        "parents": parents,
    }
    if main_process:
        run.vocabulary.save(run_dir)
        if config_text:
            run_directory.write_atomically(run_dir / "config.gin", config_text)
        run_directory.update_manifest(
            run_dir, status="running", **meta, **run_directory.environment()
        )
    writer = MetricWriter(run_dir, use_wandb=run.use_wandb, enabled=main_process)
    writer.resume_at(int(state.step))
    stop = _StopOnSigterm()

    def save(state: steps.TrainState) -> None:
        fingerprints = {
            "params_fingerprint": ckpt.params_fingerprint(state.params),
            "policy_fingerprint": ckpt.params_fingerprint(state.params["policy"]),
        }
        step = int(state.step)
        checkpoints.save(state, {**meta, **fingerprints, "step": step})
        checkpoints.wait()
        if main_process:
            run_directory.update_manifest(run_dir, step=step, **fingerprints)

    # ---- 6. The loop ----------------------------------------------------------------
    train_step = ready.train_step()
    eval_step = jax.jit(
        steps.make_eval_step(ready.objective),
        out_shardings=meshes.replicated(ready.mesh),
    )
    first = int(state.step)
    sample_period = run.sample_period or run.eval_period
    window: list[Metrics] = []
    latest: dict[str, float] = {}
    progress = Progress(first, run.train_steps, enabled=main_process)
    with stop, progress, writer:
        batches = feed.iterate(first, rows=rows)
        for step in range(first, run.train_steps):
            batch = meshes.put_batch(ready.mesh, next(batches))
            state, metrics = train_step(state, batch, key, frozen)
            window.append(metrics)
            done = step + 1
            last = done == run.train_steps
            # Read once: a signal that comes later in this step stops the next one.
            told_to_stop = stop.requested
            saving = last or told_to_stop or done % run.checkpoint_period == 0
            if saving or done % run.log_period == 0:
                if not bool(state.finite):
                    raise _non_finite(run_dir, feed, int(state.step))
                latest = summarize(window)
                rates = optimizers.learning_rates(state.opt_state)
                latest |= {k: float(v) for k, v in rates.items()}
                latest |= progress.update(done, latest)
                writer.write(done, {f"train/{k}": v for k, v in latest.items()})
                window.clear()
            # Evaluation comes before the checkpoint: a run killed in between goes
            # back to the checkpoint before it and repeats it.
            if (last or done % run.eval_period == 0) and not told_to_stop:
                if ready.inputs.evaluation:
                    found = evaluate(ready, eval_step, state.params, run.eval_steps)
                    writer.write(done, {f"eval/{k}": v for k, v in found.items()})
            if (last or done % sample_period == 0) and not told_to_stop:
                if run.sampler:
                    path = run_dir / "samples" / f"{done}.jsonl"
                    run.sampler.write(path, ready, state.params["policy"], run.seed)
            if saving:
                save(state)
            if told_to_stop:
                break

    # ---- 7. The end -----------------------------------------------------------------
    finished = int(state.step) >= run.train_steps
    if main_process:
        status = "finished" if finished else "interrupted"
        run_directory.update_manifest(run_dir, status=status)
    if not finished:
        _log.warning(
            "Stopped by SIGTERM after step %d; the same command goes on from there.",
            int(state.step),
        )
    checkpoints.close()
    return latest


def evaluate(
    ready: Setup, eval_step: Any, params: Any, eval_steps: int | None
) -> dict[str, float]:
    """Metrics of the held-out feed: sums over all batches, divided once."""
    feed = ready.inputs.evaluation
    rows = meshes.process_rows(feed.batch_size)
    found = []
    for i, batch in enumerate(feed.evaluation_batches()):
        if eval_steps is not None and i >= eval_steps:
            break
        local = {k: v[rows] for k, v in batch.items()}
        found.append(eval_step(params, meshes.put_batch(ready.mesh, local)))
    return steps.evaluation_loss(summarize(found))


def _load_policy(path: str, ready: Setup) -> ckpt.Policy:
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
)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _reference_policy(
    path: str | None, ready: Setup, key: jax.Array
) -> tuple[str, Callable[[], Any]]:
    """The reference policy's fingerprint, and how to load it."""
    if path:
        fingerprint = ckpt.read_meta(path)["policy_fingerprint"]
        return fingerprint, lambda: _load_policy(path, ready).params
    _log.warning(
        "No INITIAL_CHECKPOINT_PATH: the reference is the randomly initialised policy. "
        "Give a supervised run's directory to align a trained one."
    )
    state = ready.init_state(jax.random.fold_in(key, _INIT_STREAM))
    policy = state.params["policy"]
    return ckpt.params_fingerprint(policy), lambda: policy


def _check_resumable(saved: dict[str, Any], feed: Any, run: Run) -> None:
    """Refuses to continue a run on other data: its position would mean nothing."""
    now = {
        "data_fingerprint": feed.fingerprint,
        "seed": run.seed,
        "batch_size": run.dataset.batch_size,
    }
    differing = [k for k, v in now.items() if saved[k] != v]
    if differing:
        lines = [f"{k}: saved {saved[k]!r}, now {now[k]!r}" for k in differing]
        raise ValueError(
            "The run directory holds a checkpoint of another run. Give another "
            "--run_dir, or the settings it was started with. " + "; ".join(lines)
        )


def _non_finite(run_dir: Path, feed: Any, good_steps: int) -> NonFiniteLossError:
    """Saves the batch that broke the run and says where it is."""
    path = run_dir / f"non_finite_step_{good_steps + 1}.npz"
    if jax.process_index() == 0:
        np.savez(path, **feed.batch(good_steps))
    return NonFiniteLossError(
        f"The loss or a gradient of step {good_steps + 1} is NaN or infinite. The "
        f"batch is saved in {path}, and no checkpoint was touched: lower the learning "
        "rate or clip the gradient, then start the same command again."
    )


class _StopOnSigterm:
    """Turns SIGTERM into a request to stop after the current step."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        # Only the main thread may install handlers; elsewhere, nobody sends signals.
        self._usable = threading.current_thread() is threading.main_thread()
        if self._usable:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *unused: Any) -> None:
        self.requested = True

    def __exit__(self, *unused: object) -> None:
        if self._usable:
            signal.signal(signal.SIGTERM, self._previous)
