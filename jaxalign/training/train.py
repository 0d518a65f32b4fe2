"""The training loop: one function, in numbered phases, readable in one sitting."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.objectives.metrics import Metrics, sample_pairs, summarize
from jaxalign.training import checkpoints as ckpt
from jaxalign.training import (
    distributed,
    mirror,
    optimizers,
    profiling,
    reference_cache,
    run_directory,
    symptoms,
    watchdog,
)
from jaxalign.training import mesh as meshes
from jaxalign.training import step as steps
from jaxalign.training.metric_writers import (
    MetricWriter,
    Progress,
    write_calibration,
)
from jaxalign.training.run import Run, Setup, load_policy, reference_policy, setup

_log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


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
    folder = mirror.RunFolder(run.run_dir, keep=run.keep_checkpoints)
    run_dir = folder.path
    main_process = jax.process_index() == 0
    checkpoints = ckpt.Checkpoints(run_dir, keep=run.keep_checkpoints)
    # Rewards stay in the units that the run started with.
    stats = None
    if checkpoints.steps():
        stats = ckpt.newest_meta(run_dir).get("reward_stats")

    # ---- 2. Data, objective, mesh: every check that needs no compiler ---------------
    ready = setup(run, reward_stats=tuple(stats) if stats else None)
    dataset = run.dataset
    feed = ready.inputs.train
    rows = meshes.process_rows(ready.mesh, dataset.batch_size)

    # ---- 3. State: this run's checkpoint, else the initial policy, else random ------
    key = jax.random.key(run.seed)
    restored = checkpoints.restore(ready.abstract_state)
    folder.set_aside(checkpoints.set_aside)
    start_policy = None
    if run.initial_checkpoint_path and not restored:
        start_policy = load_policy(run.initial_checkpoint_path, ready)
    if restored:
        state, saved = restored
        _check_resumable(saved, feed, run)
        parents = saved["parents"]
        _log.info("Resumed %s at step %d", folder.name, int(state.step))
    else:
        state = ready.init_state(key)
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
        ref_fingerprint, load = reference_policy(source, ready, key)
        if not restored and run.reference_checkpoint_path and main_process:
            ckpt.verify(source)  # with its numbers cached it may never be loaded
        parents["reference"] = ref_fingerprint
        if ready.online_reference:
            frozen = load()
        if ready.moving_reference and not restored:
            carried = {**state.carried, "reference": {"policy": load()}}
            state = dataclasses.replace(state, carried=carried)
        eval_feed = ready.inputs.evaluation
        join = functools.partial(
            reference_cache.join,
            objective=ready.objective,
            policy_fingerprint=ref_fingerprint,
            load_params=load,
            cache_dir=dataset.cache_folder,
            mesh=ready.mesh,
            verify_cached=run.verify_reference,
        )
        if run.reference == "cached":
            feed = join(feed)
        # A reference that moves is never cached; one that rests, always for evaluation.
        if eval_feed is not None and not ready.moving_reference:
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
    folder.started()
    writer = MetricWriter(run_dir, use_wandb=run.use_wandb, enabled=main_process)
    writer.resume_at(int(state.step))
    stop = distributed.StopOnSigterm()
    profile = profiling.Profile(run_dir, run.profile_steps, enabled=main_process)

    def save(state: steps.TrainState) -> None:
        checkpoints.save(state, {**meta, "step": int(state.step)}, then=saved)

    def saved(meta: dict[str, Any]) -> None:  # in another thread, while steps go on
        def reached() -> None:
            names = ("step", "params_fingerprint", "policy_fingerprint")
            run_directory.update_manifest(run_dir, **{k: meta[k] for k in names})

        folder.saved(meta["step"], reached if main_process else lambda: None)

    watch = symptoms.Watch()

    def watched(numbers: dict[str, float]) -> None:
        if watch.check(numbers) and main_process:
            run_directory.update_manifest(run_dir, warnings=watch.told)

    # ---- 6. The loop ----------------------------------------------------------------
    train_step = ready.train_step()
    eval_step = ready.eval_step()
    first = int(state.step)
    sample_period = run.sample_period or run.eval_period
    window: list[Metrics] = []
    latest: dict[str, float] = {}
    progress = Progress(first, run.train_steps, enabled=main_process)
    distributed.barrier(f"step {first}", run.timeout)
    dog = watchdog.Watchdog(run.timeout, jax.process_count() > 1)
    with dog, stop, progress, folder, writer, checkpoints:
        batches = feed.iterate(first, rows=rows)
        for step in range(first, run.train_steps):
            done = step + 1
            dog.beat(f"step {step}")
            checkpoints.check()
            profile.before(done, state)
            with profile.input():
                rows_of_step = next(batches)
                batch = meshes.put_batch(ready.mesh, rows_of_step, dataset.batch_size)
            train_step = profile.compiled(train_step, state, batch, key, frozen)
            state, metrics = train_step(state, batch, key, frozen)
            profile.after(done, state)
            window.append(metrics)
            last = done == run.train_steps
            # Read once: a signal that comes later in this step stops the next one.
            told_to_stop = stop.after(done)
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
                watched(latest)
                folder.logged()
            # Evaluation comes before the checkpoint: a run killed in between goes
            # back to the checkpoint before it and repeats it.
            if (last or done % run.eval_period == 0) and not told_to_stop:
                if ready.inputs.evaluation:
                    found = evaluate(ready, eval_step, state, run.eval_steps)
                    summary = steps.evaluation_loss(summarize(found))
                    writer.write(done, {f"eval/{k}": v for k, v in summary.items()})
                    pairs = sample_pairs(found, "value/correlation")
                    if pairs and main_process:
                        write_calibration(run_dir, done, *pairs)
                dog.beat(f"the evaluation after step {done}")
            if (last or done % sample_period == 0) and not told_to_stop:
                if run.sampler:
                    path = run_dir / "samples" / f"{done}.jsonl"
                    found = run.sampler.write(
                        path, ready, state.params["policy"], run.seed
                    )
                    writer.write(done, found)
                    watched(found)
                dog.beat(f"the samples after step {done}")
            if saving:
                save(state)
            if told_to_stop:
                break
        checkpoints.settle()

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
        # A launcher that puts the job back into a queue waits for this file.
        marker = os.environ.get("JAXALIGN_INTERRUPTED_FILE")
        if marker and main_process:
            Path(marker).touch()
    checkpoints.close()
    folder.close()
    return latest


def evaluate(
    ready: Setup, eval_step: Any, state: steps.TrainState, eval_steps: int | None
) -> list[Metrics]:
    """The metrics of each batch of the held-out feed."""
    feed = ready.inputs.evaluation
    rows = meshes.process_rows(ready.mesh, feed.batch_size)
    batches = feed.evaluation_batches(rows)
    return [
        eval_step(
            state.params,
            meshes.put_batch(ready.mesh, batch, feed.batch_size),
            state.carried,
        )
        for batch in itertools.islice(batches, eval_steps)
    ]


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
