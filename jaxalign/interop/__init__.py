"""Other projects' checkpoints."""

from jaxalign.interop.folders import Foreign, Leaf, Source, place
from jaxalign.interop.huggingface import is_folder as is_huggingface

__all__ = ["Foreign", "Leaf", "Source", "is_huggingface", "place"]
