"""Other projects' checkpoints."""

from jaxalign.interop.huggingface import load_huggingface, save_huggingface

__all__ = ["load_huggingface", "save_huggingface"]
