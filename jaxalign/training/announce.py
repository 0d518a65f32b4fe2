"""What a run tells the person who started it: what it is, how it goes, what is next."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxalign.data import chat_template
from jaxalign.models import processor
from jaxalign.models.soft_prompt import SoftPrompt
from jaxalign.training import checkpoints

_log = logging.getLogger(__name__)


def random_start(run: Any, objective: Any) -> None:
    """Warns of a preference objective without a trained policy to begin with.

    Args:
      run: the `jaxalign.training.run.Run`.
      objective: what it trains by.
    """
    if objective.uses_reference and not run.initial_checkpoint_path:
        reference = "the reference is it too"
        if run.reference_checkpoint_path:
            reference = "only the reference is trained"
        _log.warning(
            "No INITIAL_CHECKPOINT_PATH: %s starts from random weights, and %s. Give a "
            "supervised run's directory: --checkpoint=runs/sft.",
            type(objective).__name__,
            reference,
        )


def another_template(run: Any) -> None:
    """Warns of a start that learnt chats in another frame than this run's.

    Args:
      run: the `jaxalign.training.run.Run`.
    """
    path = run.initial_checkpoint_path
    if not path:
        return
    try:
        told = checkpoints.chat_template(path)
    except FileNotFoundError:
        return  # which the start says
    if told is None or told == chat_template.resolve(run.dataset.chat_template):
        return
    names = {text: name for name, text in chat_template.TEMPLATES.items()}
    _log.warning(
        "%s learnt chats by CHAT_TEMPLATE=%r, this run has %r: chat messages will look "
        "different to it.",
        path,
        names.get(told, told),
        run.dataset.chat_template or chat_template.DEFAULT,
    )


def started(run: Any, ready: Any, step: int) -> None:
    """Says what a run is, before its step is compiled.

    Args:
      run: the `jaxalign.training.run.Run`.
      ready: its `Setup`.
      step: the restored step; 0 in a new run.
    """
    if jax.process_index() > 0:
        return
    for line in describe(run, ready, step):
        _log.info("%s", line)
    processor.warn_of_bfloat16(run.model.config.dtype)
    if step == 0:
        random_start(run, ready.objective)
        another_template(run)


def describe(run: Any, ready: Any, step: int) -> list[str]:
    """Objective, network, data, start and reference of a run, a line each."""
    objective, config = ready.objective, run.model.config
    counts = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        for name, params in ready.abstract_state.networks.items()
    }
    main = counts.pop(objective.main)
    others = "".join(f", {n} {c:,}" for n, c in counts.items())
    lines = [
        f"{type(objective).__name__} of a T5: {main:,} parameters{others} "
        f"({config.num_encoder_layers}+{config.num_decoder_layers} layers of width "
        f"{config.emb_dim}, {run.vocabulary.vocab_size:,} ids)",
        f"Data: {_data(ready.inputs.train)} of {', '.join(run.dataset.sources())}"
        + (
            f"; evaluation: {_data(ready.inputs.evaluation)}"
            if ready.inputs.evaluation
            else "; no evaluation data"
        ),
    ]
    if not ready.partition.whole:
        lines.append(_trained(run, ready))
    start = run.initial_checkpoint_path or "random weights"
    if step:
        start = f"this run's checkpoint of step {step}"
    text = f"Start: {start}"
    if objective.uses_reference:
        source = run.reference_checkpoint_path or run.initial_checkpoint_path
        text += f"; reference ({run.reference}): {source or 'random weights'}"
    lines.append(text)
    mesh = " x ".join(f"{name}={size}" for name, size in ready.mesh.shape.items())
    lines.append(
        f"Steps {step} to {run.train_steps}, {run.dataset.batch_size} rows each, on "
        f"{mesh}"
    )
    return lines


def _trained(run: Any, ready: Any) -> str:
    """What trains of a run's networks, and what stands beside them."""
    state = ready.abstract_state
    train, rest = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.frozen)
    )
    adapter = f", with {run.adapter}" if run.adapter else ""
    text = f"Trains: {train:,} of {train + rest:,} parameters{adapter}"
    if isinstance(run.adapter, SoftPrompt):
        shape, length = ready.inputs.train.shape, run.adapter.length
        text += (
            f"; before {shape.prompts} prompts it makes encoder rows of "
            f"{shape.encoder_length} tokens {shape.prompts * length} longer"
        )
    return text


def _data(feed: Any) -> str:
    if getattr(feed, "endless", False):
        return "rows made on the fly"
    rows = sum(len(cache) for cache in feed.caches)
    indices = [cache.index for cache in feed.caches]
    prompts = sum(int(index.prompt_lengths.sum()) for index in indices)
    responses = sum(int(index.response_lengths.sum()) for index in indices)
    text = f"{rows:,} rows ({prompts:,} + {responses:,} tokens)"
    if left_out := sum(plan.left_out["rows"] for plan in feed.plans):
        text += f", {left_out:,} of them left out as too long"
    return text


@contextlib.contextmanager
def compiling(what: str, now: bool = True) -> Iterator[None]:
    """Says that something is compiled here, and how long it took.

    Args:
      what: is compiled.
      now: whether it is, or was before.
    """
    if not now or jax.process_index() > 0:
        yield
        return
    _log.info("Compiling %s ...", what)
    begin = time.monotonic()
    yield
    _log.info("Compiled %s in %.1f s", what, time.monotonic() - begin)


def evaluated(step: int, numbers: Mapping[str, float]) -> None:
    """Tells the numbers of an evaluation when they come.

    Args:
      step: steps taken.
      numbers: by name; sizes of batches and quantiles are left to metrics.jsonl.
    """
    if jax.process_index() == 0:
        told = [
            f"{name} {value:.4g}"
            for name, value in numbers.items()
            if not name.startswith("batch/") and name.count("/") < 2
        ]
        _log.info("Evaluation after step %d: %s", step, ", ".join(told))


def ended(run_dir: str, step: int) -> None:
    """Says where a finished run's checkpoint is, and what can be done with it."""
    if jax.process_index() > 0:
        return
    place = shlex.quote(run_dir)
    _log.info("Finished at step %d: %s/checkpoints/%d", step, run_dir, step)
    for command in (
        f"generate --checkpoint={place} --prompts=FILE --output=FILE",
        f"eval --checkpoint={place} --data=FILE --judge=my_judge.py:score",
        f"report {place}",
    ):
        _log.info("Next: jaxalign %s", command)
