"""The HTTP API of a checkpoint, compatible with OpenAI's."""

from jaxalign.serving.api import application, serve

__all__ = ["application", "serve"]
