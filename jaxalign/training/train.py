"""The training loop: one function, in numbered phases, readable in one sitting."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import files, models
from jaxalign.cluster import distributed, exclusive, watchdog
from jaxalign.cluster import mesh as meshes
from jaxalign.data import chat_template
from jaxalign.objectives.metrics import Metrics, sample_pairs, summarize
from jaxalign.training import (
    announce,
    identity,
    mirror,
    optimizers,
    profiling,
    reference_cache,
    run_directory,
    starts,
    symptoms,
)
from jaxalign.training import checkpoints as ckpt
from jaxalign.training import step as steps
from jaxalign.training.checkpoint_writer import Checkpoints
from jaxalign.training.metric_writers import MetricWriter, write_calibration
from jaxalign.training.progress import Progress
from jaxalign.training.run import Run, Setup, in_layout_of, setup
from jaxalign.training.standard import Standard

_log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


@exclusive.one_run_at_a_time
def train(run: Run, config_text: str = "") -> dict[str, float]:
    """Trains until ``run.train_steps``, or goes on where a killed run stopped.

    The batch of step ``s`` is a pure function of (data, seed, ``s``) and so is its
    random key: a run that was killed and restarted by the same command ends with the
    bits of one that was not.

    Args:
      run: what to train.
      config_text: the full gin configuration, written to ``config.gin``.

    A run directory whose run is finished stays as it is, unless there are more steps
    to take.

    Returns:
      The last logged metrics.

    Raises:
      ValueError: for settings or data that cannot work, and for a run directory of
        another run (`jaxalign.training.identity`), which stays as it is; before
        compilation.
      NonFiniteLossError: naming the step; the batch is saved in the run directory, and
        the last good checkpoint is intact.
    """
    # ---- 1. What this run is --------------------------------------------------------
    if not run.run_dir:
        raise ValueError("Say where to write: --run_dir=DIR.")
    profiling.check_steps(run.profile_steps, run.train_steps)
    folder = mirror.RunFolder(run.run_dir, keep=run.keep_checkpoints)
    run_dir = folder.path
    main_process = jax.process_index() == 0
    before = ckpt.run_meta(run_dir)
    # Rewards stay in the units that the run started with.
    stats = before.get("reward_stats") if before else None

    # ---- 2. Data, objective, mesh: every check that needs no compiler ---------------
    ready = setup(run, reward_stats=tuple(stats) if stats else None)
    dataset = run.dataset
    feed = ready.inputs.train
    rows = meshes.process_rows(ready.mesh, dataset.batch_size)
    parents = starts.parents(ready, before)
    this = identity.of(ready, parents)
    if before:
        identity.check(before, this, ready, folder.name)
        done = run_directory.read_manifest(run_dir)
        if done.get("status") == "finished" and before["step"] >= run.train_steps:
            _log.info(
                "%s is already finished, at step %d of %d. A larger TRAIN_STEPS goes "
                "on from there.",
                folder.name,
                before["step"],
                run.train_steps,
            )
            return run_directory.last_metrics(run_dir)

    # ---- 3. State: this run's checkpoint, else the initial policy, else random ------
    key = jax.random.key(run.seed)
    checkpoints = Checkpoints(run_dir, keep=run.keep_checkpoints)
    watch = symptoms.Watch()
    restored = restore(checkpoints, ready, before)
    folder.set_aside(checkpoints.set_aside)
    if restored:
        state, before = restored
        state = starts.with_frozen(ready, key, state)
        identity.check(before, this, ready, folder.name)
        watch.resume(before.get("symptoms") or watch.state())
        _log.info("Resumed %s at step %d", folder.name, int(state.step))
    else:
        state = starts.start(ready, key)
    announce.started(run, ready, int(state.step))

    # ---- 4. The reference policy's log-probabilities --------------------------------
    if ready.objective.uses_reference:
        parents["reference"], load = starts.reference_policy(
            ready, key, parents, state, new=not restored
        )
        if not restored and run.reference_checkpoint_path and main_process:
            # With its numbers cached it may never be loaded.
            ckpt.verify(run.reference_checkpoint_path)
        eval_feed = ready.inputs.evaluation
        join = functools.partial(
            reference_cache.join,
            objective=ready.objective,
            policy_fingerprint=parents["reference"],
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
        "format": 3,
        "identity": this,
        "objective": type(ready.objective).__name__,
        "main": ready.objective.main,
        "networks": starts.described(ready, parents),
        "vocabulary": run.vocabulary.to_json(),
        "vocabulary_fingerprint": run.vocabulary.fingerprint,
        "seed": run.seed,
        "batch_size": dataset.batch_size,
        "data_fingerprint": feed.fingerprint,
        "feature_lengths": dict(dataset.feature_lengths),
        "reward_stats": ready.inputs.reward_stats,
        "parents": parents,
    }
    if template := chat_template.resolve(dataset.chat_template):
        meta["chat_template"] = template
    if main_process:
        run.vocabulary.save(run_dir)
        if config_text:
            files.write_atomically(run_dir / "config.gin", config_text)
        run_directory.update_manifest(
            run_dir,
            status="running",
            **{name: value for name, value in meta.items() if name != "networks"},
            model=run.model.config.architecture(),
            execution=run.model.config.execution(),
            **run_directory.environment(),
        )
    folder.started()
    writer = MetricWriter(run_dir, use_wandb=run.use_wandb, enabled=main_process)
    writer.resume_at(int(state.step))
    stop = distributed.StopOnSigterm()
    profile = profiling.Profile(run_dir, run.profile_steps, enabled=main_process)

    standard = Standard(ready)

    def save(state: steps.TrainState) -> None:
        told = {"symptoms": watch.state(), "step": int(state.step)}
        checkpoints.save(state, {**meta, **told, **standard.of(state)}, then=saved)

    def saved(meta: dict[str, Any]) -> None:  # in another thread, while steps go on
        def reached() -> None:
            run_directory.update_manifest(
                run_dir,
                step=meta["step"],
                params_fingerprint=meta["params_fingerprint"],
                networks={n: it["fingerprint"] for n, it in meta["networks"].items()},
            )

        folder.saved(meta["step"], reached if main_process else lambda: None)

    def watched(numbers: dict[str, float]) -> None:
        if watch.check(numbers) and main_process:
            run_directory.update_manifest(run_dir, warnings=watch.told)

    # ---- 6. The loop ----------------------------------------------------------------
    train_step = ready.train_step()
    eval_step = ready.eval_step()
    first = int(state.step)
    sample_period = run.sample_period or run.eval_period
    main = ready.objective.main
    can_generate = isinstance(ready.networks[main], models.EncoderDecoder)
    window: list[Metrics] = []
    latest: dict[str, float] = {}
    progress = Progress(first, run.train_steps, enabled=main_process)
    distributed.barrier(f"step {first}", run.timeout)
    dog = watchdog.Watchdog(run.timeout, jax.process_count() > 1)
    # The dog is the first to go: the writer and the folder may have much to copy.
    with stop, progress, folder, writer, profile, checkpoints, dog:
        batches = feed.iterate(first, rows, state=lambda: state)
        for step in range(first, run.train_steps):
            done = step + 1
            dog.beat(f"step {step}", window[-1:])
            checkpoints.check()
            profile.before(done, state)
            with profile.input():
                rows_of_step = next(batches)
                batch = meshes.put_batch(ready.mesh, rows_of_step, dataset.batch_size)
            with announce.compiling("the training step", step == first):
                train_step = profile.compiled(train_step, state, batch, key)
                state, metrics = train_step(state, batch, key)
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
                with dog.patient("copying the run's files"):
                    folder.logged()
            # Evaluation comes before the checkpoint: a run killed in between goes
            # back to the checkpoint before it and repeats it.
            if (last or done % run.eval_period == 0) and not told_to_stop:
                if ready.inputs.evaluation:
                    found = evaluate(ready, eval_step, state, run.eval_steps, dog.beat)
                    summary = steps.evaluation_loss(summarize(found))
                    writer.write(done, {f"eval/{k}": v for k, v in summary.items()})
                    announce.evaluated(done, summary)
                    pairs = sample_pairs(found, "value/correlation")
                    if pairs and main_process:
                        write_calibration(run_dir, done, *pairs)
                dog.beat(f"the evaluation after step {done}")
            if (last or done % sample_period == 0) and not told_to_stop:
                if run.sampler and can_generate:
                    path = run_dir / "samples" / f"{done}.jsonl"
                    with dog.patient(f"the samples after step {done}"):
                        own = ready.partition.join(state.params, state.frozen)[main]
                        found = run.sampler.write(path, ready, own, run.seed)
                    writer.write(done, found)
                    watched(found)
            if saving:
                with dog.patient(f"the checkpoint of step {done}"):
                    save(state)
            if told_to_stop:
                break
        with dog.patient("the last checkpoint"):
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
    if finished:
        announce.ended(folder.name, int(state.step))
    return latest


def restore(
    checkpoints: Checkpoints, ready: Setup, saved: dict[str, Any] | None
) -> tuple[steps.TrainState, dict[str, Any]] | None:
    """The newest intact state of a run, in the layout that the run has now."""
    own = ready.run.model.config.scan_layers
    layout = _scans(saved) if saved else own
    if layout == own:
        return checkpoints.restore(ready.abstract_state)
    found = checkpoints.restore(ready.in_layout(layout).abstract_state)
    if found is None:
        return None
    state, meta = found
    # What rests may not be in the checkpoint.
    resting = {name: ready.abstract_state.frozen[name] for name in state.frozen}
    like = ready.abstract_state.replace(frozen=resting)
    return in_layout_of(like, state), meta


def _scans(meta: dict[str, Any]) -> bool:
    """Whether the layers of a checkpoint's networks are stacked."""
    main = meta["networks"][meta["main"]]
    return main.get("execution", {}).get("scan_layers", False)


def evaluate(
    ready: Setup,
    eval_step: Any,
    state: steps.TrainState,
    eval_steps: int | None,
    beat: Callable[[str, Any], None] = lambda place, begun: None,
) -> list[Metrics]:
    """The metrics of each batch of the held-out feed.

    ``beat`` hears of each batch that is begun, and gets arrays that come of it.
    """
    feed = ready.inputs.evaluation
    rows = meshes.process_rows(ready.mesh, feed.batch_size)
    bins = ready.inputs.evaluation_bins(eval_steps)
    found = []
    for i, batch in enumerate(feed.evaluation_batches(rows, bins)):
        placed = meshes.put_batch(ready.mesh, batch, feed.batch_size)
        found.append(eval_step(state, placed))
        beat(f"batch {i} of the evaluation", found[-1])
    return found


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
