"""A bucket on this machine: the real client, real HTTP, a server that speaks S3."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxalign import remote


@contextlib.contextmanager
def server() -> Iterator[Callable[[], str]]:
    """Serves S3 and gives a function that makes a bucket and returns its address.

    The environment names the server, so processes that are started find it too.
    """
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    serving = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    serving.start()
    host, port = serving.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        # A client keeps the server that it was made for.
        s3fs.S3FileSystem.clear_instance_cache()
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")

        def make() -> str:
            url = f"s3://bucket-{uuid.uuid4().hex[:12]}"
            fs, path = remote.connect(url)
            fs.mkdir(path)
            return url

        yield make
    serving.stop()


def put(url: str, content: bytes) -> None:
    fs, path = remote.connect(url)
    fs.pipe_file(path, content)


def get(url: str) -> bytes:
    fs, path = remote.connect(url)
    return fs.cat_file(path)


def put_folder(folder: Path, url: str) -> None:
    """Copies a folder as `aws s3 cp --recursive` does."""
    remote.upload(
        {
            f"{url}/{path.relative_to(folder).as_posix()}": path
            for path in folder.rglob("*")
            if path.is_file()
        }
    )
