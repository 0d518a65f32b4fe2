"""Peak memory and time of ``jaxalign convert``: hf to jaxalign, and that to t5x.

    python benchmarks/convert_memory.py FOLDER [--size=small|xl] [--keep]

The folder is made with random bfloat16 weights, shard by shard; small has 100 million
parameters, xl the 3 billion of T5 1.1 XL. Each conversion is a process of its own,
whose peak is the kernel's ``VmHWM``. One line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxalign import models
from jaxalign.interop import huggingface
from jaxalign.interop.folders import flat
from jaxalign.interop.leaves import Leaf
from jaxalign.vocabularies import ByteVocabulary

ROWS, BYTES = 32128, 259
SIZES = {
    "small": models.T5Config(ROWS, 512, 6, 64, 1024, 8, 8),
    "xl": models.T5Config(ROWS, 2048, 32, 64, 5120, 24, 24),
}
SHARD = 2 << 30

# Tells its own peak when all is done.
CHILD = """
import json, re, sys
from jaxalign.cli import main
status = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(json.dumps({"status": status, "peak": int(peak[1]) << 10}))
"""


def random_leaf(path: str, shape: tuple[int, ...]) -> Leaf:
    """Numbers that are made when they are read, the same ones each time."""

    def block(index: tuple[slice, ...]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        values = rng.standard_normal(shape, np.float32)
        return (values * shape[0] ** -0.5).astype(jnp.bfloat16)[index]

    return Leaf(shape, np.dtype(jnp.bfloat16), block, (path,))


def make(folder: Path, config: models.T5Config) -> None:
    model = models.T5(config)
    leaves = {
        path: random_leaf(path, leaf.shape)
        for path, leaf in flat(models.shapes(model)).items()
    }
    vocabulary = ByteVocabulary(extra_ids=ROWS - BYTES)
    huggingface.write(folder, leaves, model, vocabulary, dtype="bfloat16", shard=SHARD)


def convert(source: Path, made: Path, kind: str) -> dict[str, float]:
    argv = ["convert", str(source), str(made), f"--format={kind}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *argv],
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    if told["status"]:
        raise SystemExit(done.stdout)
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    return {
        "to": kind,
        "peak_gib": round(told["peak"] / (1 << 30), 2),
        "seconds": round(time.perf_counter() - begun, 1),
        "gb_on_disk": round(size / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--keep", action="store_true", help="leave what was made")
    given = parser.parse_args()
    config = SIZES[given.size]
    given.folder.mkdir(parents=True, exist_ok=True)
    hf, run, t5x = (given.folder / name for name in ("hf", "run", "t5x"))
    shapes = flat(models.shapes(models.T5(config))).values()
    count = sum(math.prod(leaf.shape) for leaf in shapes)
    begun = time.perf_counter()
    make(hf, config)
    seconds = round(time.perf_counter() - begun, 1)
    print(json.dumps({"size": given.size, "parameters": count, "seconds": seconds}))
    try:
        print(json.dumps({"from": "hf", **convert(hf, run, "jaxalign")}), flush=True)
        print(json.dumps({"from": "jaxalign", **convert(run, t5x, "t5x")}), flush=True)
    finally:
        if not given.keep:
            for path in (hf, run, t5x):
                shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
