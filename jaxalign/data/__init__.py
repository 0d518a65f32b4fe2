"""Data for training: the tokenised cache, the packing plan and the feed.

Imports neither TensorFlow nor seqio: preparing a cache is ``jaxalign.prepare``'s.
"""

from jaxalign.data.cache import TokenizedCache
from jaxalign.data.cache_writer import CacheWriter
from jaxalign.data.convert import to_arrays
from jaxalign.data.cuts import Seen, seen
from jaxalign.data.feed import EvaluationBatches, Feed
from jaxalign.data.plan import Placement, Plan, RowShape, common_shape, pack
from jaxalign.data.rows import Index, Row, build_index

__all__ = [
    "CacheWriter",
    "EvaluationBatches",
    "Feed",
    "Index",
    "Placement",
    "Plan",
    "Row",
    "RowShape",
    "Seen",
    "TokenizedCache",
    "build_index",
    "common_shape",
    "pack",
    "seen",
    "to_arrays",
]
