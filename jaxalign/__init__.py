"""jaxalign: alignment objectives for T5 encoder-decoders in JAX and Flax.

Importing the package imports nothing else: name the module that you need, such as
``jaxalign.losses``, ``jaxalign.models`` or ``jaxalign.batch``. Everything but
``jaxalign.prepare`` and ``jaxalign.tasks`` works without TensorFlow and seqio.
``jaxalign.train`` and ``jaxalign.load`` import the rest when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jaxalign.inference.policy import Policy

__version__ = "0.1.0"


def load(path: str | Path, mesh: dict[str, int] | None = None) -> Policy:
    """The policy of a jaxalign run, a Hugging Face folder or a T5X checkpoint.

    Args:
      path: here or in a bucket; its format is told by its content.
      mesh: sizes ``{"data", "fsdp", "tensor"}`` of the devices to spread it over.

    Example::

        policy = jaxalign.load("flan-t5-small")
        policy.generate(["Is it safe?"], num_samples=4)
    """
    from jaxalign.cluster import programs

    programs.keep()
    from jaxalign.inference.policy import Policy

    return Policy(path, mesh)


def train(
    *,
    objective: str = "sft",
    data: str | Path | None = None,
    run_dir: str | Path,
    checkpoint: str | Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    gin_files: Sequence[str | Path] = (),
    **macros: Any,
) -> Policy:
    """What the verb ``jaxalign train`` does with these flags, to the same bits.

    A run that was killed goes on when it is called again; a finished one is loaded.

    Args:
      objective: a run's gin file: ``"dpo"`` is ``runs/dpo.gin``, ``"my_run.gin"`` one
        of your own.
      data: a file, ``"task"``, ``"task:file"`` or a prepared cache.
      run_dir: where everything is written.
      checkpoint: where training starts: a run, a Hugging Face folder or a T5X
        checkpoint, which says the network, too.
      steps: how many in all.
      batch_size: rows of a step, over all devices.
      learning_rate: the schedule's peak.
      seed: of initialisation, order and dropout.
      gin_files: more of them, such as ``"models/t5_1_1_small.gin"``.
      **macros: other settings of the gin files by their names, ``BETA=0.2``; text that
        begins with ``@`` or ``%`` is a reference, ``SCHEDULE="@schedules.linear()"``.

    Returns:
      The policy of the run's newest checkpoint.

    Raises:
      ValueError: for settings or data that cannot work, before anything is compiled.

    Example::

        policy = jaxalign.train(
            checkpoint="flan-t5-small",
            data="pairs.jsonl",
            objective="dpo",
            run_dir="runs/dpo",
            steps=500,
        )
        policy.generate(["Is it safe?"])
    """
    from jaxalign.cli import verbs
    from jaxalign.cluster import programs

    programs.keep()
    settings = verbs.Settings(
        data=_text(data),
        checkpoint=_text(checkpoint),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        run_dir=_text(run_dir),
    )
    verbs.train_with(objective, gin_files, settings, macros)
    return load(run_dir)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
