"""Other projects' checkpoints."""

from jaxalign.interop.folders import Foreign, Leaf, Source, place

__all__ = ["Foreign", "Leaf", "Source", "place"]
