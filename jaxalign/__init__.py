"""jaxalign: alignment objectives for T5 encoder-decoders in JAX and Flax.

Importing the package imports nothing else: name the module that you need, such as
``jaxalign.losses``, ``jaxalign.models`` or ``jaxalign.batch``. Everything but
``jaxalign.prepare`` and ``jaxalign.tasks`` works without TensorFlow and seqio.
``jaxalign.load`` imports the rest when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxalign.inference.policy import Policy

__version__ = "0.1.0"


def load(path: str, mesh: dict[str, int] | None = None) -> Policy:
    """The policy of a jaxalign run, a Hugging Face folder or a T5X checkpoint.

    Args:
      path: here or in a bucket; its format is told by its content.
      mesh: sizes ``{"data", "fsdp", "tensor"}`` of the devices to spread it over.

    Example::

        policy = jaxalign.load("flan-t5-small")
        policy.generate(["Is it safe?"], num_samples=4)
    """
    from jaxalign.inference.policy import Policy

    return Policy(path, mesh)
