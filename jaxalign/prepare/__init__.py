"""The first half of data: sources, validation, tokenisation, the cache on disk.

This is the only part of the package that may import TensorFlow or seqio, and it does
so only for sources that need them: JSON Lines and Parquet are read without.
"""

from jaxalign.prepare.caches import prepare
from jaxalign.prepare.summary import describe
from jaxalign.prepare.tasks import add_task, list_tasks

__all__ = [
    "add_task",
    "describe",
    "list_tasks",
    "prepare",
]
