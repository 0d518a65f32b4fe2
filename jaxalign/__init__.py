"""jaxalign: alignment objectives for T5 encoder-decoders in JAX and Flax.

Importing the package imports nothing else: name the module that you need, such as
``jaxalign.losses``, ``jaxalign.models`` or ``jaxalign.batch``. Everything but
``jaxalign.prepare`` and ``jaxalign.tasks`` works without TensorFlow and seqio.
"""

__version__ = "0.1.0"
