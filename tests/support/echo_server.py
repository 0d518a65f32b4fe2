"""`jaxalign serve` without a network: a backend that answers a prompt with itself."""

from __future__ import annotations

import contextlib
import threading

import uvicorn

from jaxalign.serving import api, server
from jaxalign.vocabularies import ByteVocabulary


class Echo:
    """A backend that answers each prompt with itself."""

    engines = 2

    def __init__(self):
        self._running = {}

    def submit(self, prompt, seed, settings, *, max_new_tokens, num_samples):
        self._running[len(self._running)] = [prompt] * num_samples
        return len(self._running) - 1

    def step(self):
        done, self._running = self._running, {}
        return done

    def progress(self):
        return {}

    def cancel(self, ticket):
        pass

    def reset(self):
        pass


@contextlib.contextmanager
def running(config=None, **options):
    """A server's port."""
    app = api.application(Echo(), ByteVocabulary(), model="tiny", **options)
    with server.listen("127.0.0.1", 0) as sock:
        settings = {"log_level": "error", **(config or {})}
        running = uvicorn.Server(server.configuration(app, **settings))
        thread = threading.Thread(target=running.run, args=([sock],))
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()
