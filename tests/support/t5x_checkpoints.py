"""T5X checkpoints made and read by hand: msgpack by Flax, zarr by JSON and gzip.

Nothing of jaxalign's and nothing of TensorStore's is in here, so that files which both
sides read wrongly alike would be noticed.
"""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

ATTENTION = ("query", "key", "value", "out")


def names_and_shapes(
    vocab=40, emb=24, heads=3, width=6, mlp=32, layers=(2, 3), buckets=32, t5_1_0=False
):
    """The parameters of T5X's ``examples/t5`` network, written out from its code."""
    joined = heads * width
    shapes = {"token_embedder/embedding": (vocab, emb)}
    for stack, depth in zip(("encoder", "decoder"), layers, strict=True):
        shapes[f"{stack}/relpos_bias/rel_embedding"] = (heads, buckets)
        shapes[f"{stack}/{stack}_norm/scale"] = (emb,)
        attentions = {"encoder": {"attention": "pre_attention"}}.get(
            stack,
            {
                "self_attention": "pre_self_attention",
                "encoder_decoder_attention": "pre_cross_attention",
            },
        )
        for i in range(depth):
            layer = f"{stack}/layers_{i}"
            for name, norm in attentions.items():
                shapes[f"{layer}/{norm}_layer_norm/scale"] = (emb,)
                for part in ATTENTION:
                    shape = (joined, emb) if part == "out" else (emb, joined)
                    shapes[f"{layer}/{name}/{part}/kernel"] = shape
            shapes[f"{layer}/pre_mlp_layer_norm/scale"] = (emb,)
            for wi in ("wi",) if t5_1_0 else ("wi_0", "wi_1"):
                shapes[f"{layer}/mlp/{wi}/kernel"] = (emb, mlp)
            shapes[f"{layer}/mlp/wo/kernel"] = (mlp, emb)
    if not t5_1_0:
        shapes["decoder/logits_dense/kernel"] = (emb, vocab)
    return shapes


def random_params(seed=0, dtype=np.float32, **sizes):
    """Random parameters by T5X's names."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, shape[0] ** -0.5, shape).astype(dtype)
        for name, shape in names_and_shapes(**sizes).items()
    }


def state_of(params, step=7):
    """What T5X stores beside them; Adafactor's slots, not factored."""
    one = np.zeros(1, np.float32)
    state = {"state/step": np.asarray(step, np.int32)}
    for name, value in params.items():
        slots = {"m": one, "v_row": one, "v_col": one, "v": np.float32(value) ** 2}
        state |= {f"state/param_states/{name}/{k}": v for k, v in slots.items()}
    return state


def write_msgpack(path, params, step=7, version=3, compress=False):
    """The oldest kind: everything in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"target/{k}": v for k, v in params.items()} | state_of(params, step)
    tree = {"version": version, "optimizer": _nested(flat)}
    data = serialization.msgpack_serialize(tree)
    path.write_bytes(gzip.compress(data) if compress else data)
    return path


def write_legacy(
    folder, params, step=7, version=3, chunks=None, driver="file", old=False
):
    """msgpack and zarr folders.

    Args:
      chunks: of every array, cut to its shape; by default one chunk.
      driver: where T5X says that it wrote.
      old: the specification as TensorStore before 0.1.14 gave it.
    """
    folder.mkdir(parents=True)
    flat = dict(state_of(params, step))
    for name, value in params.items():
        stored = "target." + name.replace("/", ".")
        metadata = write_zarr(folder / stored, value, chunks)
        kvstore = {"driver": driver, "path": f"{stored}/"}
        if driver == "gcs":
            kvstore["bucket"] = "t5x-dummy-bucket"
        name_of = "uint16" if value.dtype == np.uint16 else value.dtype.name
        spec = {"driver": "zarr", "dtype": name_of, "kvstore": kvstore}
        if old:
            spec["path"] = kvstore.pop("path").rstrip("/")
        flat[f"target/{name}"] = spec | {"metadata": metadata}
    tree = {"version": version, "optimizer": _nested(flat)}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    return folder


def write_zarr(folder, value, chunks=None):
    folder.mkdir()
    chunks = [
        min(c, s) for c, s in zip(chunks or value.shape, value.shape, strict=False)
    ]
    chunks += value.shape[len(chunks) :]
    kinds = {"bfloat16": "bfloat16", "uint16": "<u2"}
    metadata = {
        "chunks": chunks,
        "compressor": {"id": "gzip", "level": 1},
        "dimension_separator": ".",
        "dtype": kinds.get(value.dtype.name, value.dtype.str),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(value.shape),
        "zarr_format": 2,
    }
    (folder / ".zarray").write_text(json.dumps(metadata))
    counts = [-(-s // c) for s, c in zip(value.shape, chunks, strict=True)]
    for place in itertools.product(*map(range, counts)):
        whole = np.zeros(chunks, value.dtype)
        part = value[tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunks))]  # noqa: B905
        whole[tuple(slice(size) for size in part.shape)] = part
        (folder / ".".join(map(str, place))).write_bytes(gzip.compress(whole.tobytes()))
    return {k: metadata[k] for k in ("chunks", "compressor", "shape")}


def read_zarr(folder):
    metadata = json.loads((folder / ".zarray").read_text())
    chunks, shape = metadata["chunks"], metadata["shape"]
    assert metadata["zarr_format"] == 2 and metadata["order"] == "C"
    assert metadata["filters"] is None and metadata["compressor"]["id"] == "gzip"
    dtype = np.dtype(metadata["dtype"])  # ml_dtypes adds bfloat16
    out = np.zeros(shape, dtype)
    counts = [-(-s // c) for s, c in zip(shape, chunks, strict=True)]
    for place in itertools.product(*map(range, counts)):
        data = gzip.decompress((folder / ".".join(map(str, place))).read_bytes())
        at = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunks))  # noqa: B905
        part = np.frombuffer(data, dtype).reshape(chunks)
        out[at] = part[tuple(slice(size) for size in out[at].shape)]
    return out


def read_legacy(folder):
    """The tree of a legacy checkpoint by flat name, and the version."""
    tree = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    assert set(tree) == {"version", "optimizer"}
    flat = traverse_util.flatten_dict(
        tree["optimizer"], sep="/", is_leaf=lambda _, x: "kvstore" in x
    )
    for name, value in flat.items():
        if isinstance(value, dict):
            assert value["driver"] == "zarr" and value["kvstore"]["driver"] == "file"
            stored = read_zarr(folder / value["kvstore"]["path"])
            assert list(stored.shape) == value["metadata"]["shape"]
            assert stored.dtype.name == value["dtype"]
            flat[name] = stored
    return flat, tree["version"]


def write_orbax(folder, params, step=7, **options):
    """As T5X's manager names it: the tree in the item ``state``."""
    flat = {f"target/{k}": v for k, v in params.items()} | state_of(params, step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder.absolute() / "state", _nested(flat))
    return folder


def scanned(params, heads=3):
    """The layout of ``examples/scalable_t5``: layers second, heads apart."""
    out = {}
    for name, value in params.items():
        if "/layers_0/" not in name:
            out |= {} if "/layers_" in name else {name: value}
            continue
        stack, rest = name.split("/layers_0/")
        layers = []
        while (key := f"{stack}/layers_{len(layers)}/{rest}") in params:
            layers.append(_heads_apart(key, params[key], heads))
        out[f"{stack}/{stack}/{rest}"] = np.stack(layers, 1)
    return out


def heads_apart(params, heads=3):
    """The layout of ``examples/scalable_t5`` with ``scan_layers=False``."""
    return {name: _heads_apart(name, value, heads) for name, value in params.items()}


def _heads_apart(name, value, heads):
    if "attention/" not in name or not name.endswith("kernel"):
        return value
    if "/out/" in name:
        return value.reshape(heads, -1, value.shape[1])
    return value.reshape(value.shape[0], heads, -1)


def _nested(flat):
    return traverse_util.unflatten_dict(flat, sep="/")
