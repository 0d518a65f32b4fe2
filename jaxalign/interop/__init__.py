"""Other projects' checkpoints."""

from jaxalign.interop.folders import Foreign, Source, place
from jaxalign.interop.huggingface import is_folder as is_huggingface
from jaxalign.interop.leaves import Leaf

__all__ = ["Foreign", "Leaf", "Source", "is_huggingface", "place"]
