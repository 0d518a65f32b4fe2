"""Arrays on disk, by TensorStore: opened when they are looked at, written in blocks."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from jaxalign.interop.leaves import Index, Leaf

CHUNK_BYTES = 64 << 20  # as T5X's, which it reads partitioned
NO_FILL = {"fill_missing_data_reads": False}  # a lost chunk is an error, not zeros
_QUEUE_BYTES = 256 << 20  # that wait to be compressed, beside the one being read


class Leaves(Mapping[str, Leaf]):
    """The arrays of a checkpoint by name; each is opened when it is looked at."""

    def __init__(self, openers: Mapping[str, Callable[[], Leaf]]):
        self._openers, self._open = dict(openers), {}

    def __getitem__(self, name: str) -> Leaf:
        if name not in self._open:
            self._open[name] = self._openers[name]()
        return self._open[name]

    def __contains__(self, name: object) -> bool:
        return name in self._openers

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)


def opened(
    where: Any, name: str, spec: dict[str, Any], error: type[ValueError]
) -> Leaf:
    """An array as TensorStore's `spec` says.

    Args:
      where: of what it is a part, for messages.
      name: of the array.
      spec: for ``tensorstore.open``.
      error: what is raised where it cannot be read, now or later.
    """

    def damaged(cause: Exception) -> ValueError:
        return error(
            f"{where}: the array {name!r} cannot be read: the checkpoint is damaged "
            f"or incomplete ({_said(cause)}). Copy it again."
        )

    context = spec.pop("context", None)
    try:
        store = ts.open(spec, open=True, read=True, context=context).result()
    except (ValueError, OSError) as cause:
        raise damaged(cause) from cause

    def block(index: Index) -> np.ndarray:
        try:
            return store[index].read().result()
        except (ValueError, OSError) as cause:
            raise damaged(cause) from cause

    return Leaf(tuple(store.shape), store.dtype.numpy_dtype, block, (name,))


class Queue:
    """Blocks that TensorStore's threads are compressing and writing.

    Example::

        with Queue() as queue:
            for name, leaf in leaves.items():
                queue.write(kvstore(name), leaf, "float32", {"id": "zstd", "level": 1})
    """

    def __init__(self) -> None:
        self._blocks: deque[tuple[str, int, ts.Future]] = deque()

    def write(
        self,
        kvstore: dict[str, Any],
        leaf: Leaf,
        dtype: Any,
        compressor: dict[str, Any],
        seen: Callable[[np.ndarray], None] = lambda block: None,
    ) -> dict[str, Any]:
        """Begins to write a zarr array; returns TensorStore's specification of it.

        Args:
          kvstore: where; its path ends with ``/``.
          leaf: read by blocks of rows.
          dtype: of what is written.
          compressor: of zarr.
          seen: is given every block that is written, in order.
        """
        dtype = np.dtype(dtype)
        chunks = _chunks(leaf.shape, CHUNK_BYTES // dtype.itemsize)
        metadata = {
            "shape": list(leaf.shape),
            "chunks": list(chunks),
            "compressor": compressor,
        }
        spec = {"driver": "zarr", "dtype": dtype.name, "metadata": metadata}
        where = kvstore.get("base", {}).get("path", "") + kvstore["path"]
        full = {**spec, "kvstore": kvstore, "store_data_equal_to_fill_value": True}
        with _writing(where):
            store = ts.open(full, create=True, open=True).result()
        if not leaf.shape:
            parts = [()]
        else:
            starts = range(0, leaf.shape[0], chunks[0])
            rest = (slice(None),) * (len(leaf.shape) - 1)
            parts = [(slice(i, i + chunks[0]), *rest) for i in starts]
        for part in parts:
            block = leaf.read(part).astype(dtype, copy=False)
            self._put(where, store[part], block)
            seen(block)
        return spec

    def _put(self, path: str, store: ts.TensorStore, block: np.ndarray) -> None:
        """Begins to write a block, when there is room for it."""
        self._drain(_QUEUE_BYTES)
        self._blocks.append((path, block.nbytes, store.write(block)))

    def _drain(self, left: int = 0) -> None:
        """Waits until at most so many bytes are not on disk."""
        while self._blocks and sum(size for _, size, _ in self._blocks) > left:
            path, _, future = self._blocks.popleft()
            with _writing(path):
                future.result()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """Nothing is written any more when this returns; the first error counts."""
        try:
            if error is None:
                self._drain()
        finally:
            for _, _, future in self._blocks:
                future.exception()


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """An OSError where TensorStore, which raises ValueError, cannot write."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{path} cannot be written: {_said(error)}") from error


def _said(error: Exception) -> str:
    return str(error).split(" [", 1)[0].splitlines()[0]


def _chunks(shape: Sequence[int], elements: int) -> tuple[int, ...]:
    """The largest chunks of so many elements that divide a shape evenly."""
    chunks = list(shape)
    while math.prod(chunks) > elements:
        axis = max(range(len(chunks)), key=chunks.__getitem__)
        size = chunks[axis]
        chunks[axis] = next(n for n in range(size - 1, 0, -1) if size % n == 0)
    return tuple(chunks)
