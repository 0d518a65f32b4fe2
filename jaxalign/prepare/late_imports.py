"""TensorFlow and what stands on it: imported late, and kept off the GPUs."""

from __future__ import annotations

import contextlib
import os
from typing import Any


def tensorflow() -> Any:
    """The ``tensorflow`` module, its GPUs hidden: it would take their memory from JAX.

    Raises:
      ImportError: saying how to install it, or how to do without.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "This source needs TensorFlow, which is not installed here: `pip install "
            "jaxalign` brings it. Or prepare the data on another machine and give the "
            "cache's folder as DATA; JSONL and Parquet files need no TensorFlow."
        ) from error
    # Where somebody else has initialised TensorFlow already, the choice was theirs.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf


def seqio() -> Any:
    tensorflow()
    import seqio

    return seqio
