"""A checkpoint behind the OpenAI-compatible HTTP API."""
