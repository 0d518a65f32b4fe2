"""TensorFlow, what stands on it, and Apache Beam: imported late.

TensorFlow is kept off the GPUs.
"""

from __future__ import annotations

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
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        # Somebody else has initialised TensorFlow already: the choice was theirs.
        pass
    return tf


def seqio() -> Any:
    """The ``seqio`` module; TensorFlow's GPUs are hidden first."""
    tensorflow()
    import seqio

    return seqio


def tensorflow_datasets() -> Any:
    """The ``tensorflow_datasets`` module; TensorFlow's GPUs are hidden first."""
    tensorflow()
    import tensorflow_datasets

    return tensorflow_datasets


def apache_beam() -> Any:
    """The ``apache_beam`` module.

    Raises:
      ImportError: saying how to install it, or how to do without.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise ImportError(
            "beam_options need Apache Beam, which is not installed here: `pip install "
            "'jaxalign[beam]'` brings it. Without beam_options the data is prepared "
            "by this process alone, with the same result."
        ) from error
    return apache_beam
