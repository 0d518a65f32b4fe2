"""A run's adapter as a folder of PEFT, without the network that it is beside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import models
from jaxalign.inference import verify as verification
from jaxalign.interop import huggingface, peft
from jaxalign.interop.folders import unstack
from jaxalign.interop.new_folder import new_folder
from jaxalign.training import checkpoints, foreign


def convert(
    src: str, dst: str, network: str | None, base: str | None, verify: bool
) -> str:
    """See `jaxalign.inference.convert.convert`."""
    if foreign.opened(src):
        raise ValueError(
            f"{src} is no run that trained an adapter, which --format=peft writes: "
            "give --format=hf, t5x or jaxalign."
        )
    meta = checkpoints.read_meta(src)
    name = network or meta["main"]
    about = checkpoints.description(meta, name, src)
    found = checkpoints.load_adapter(src, name)  # or says that it has none
    model = models.restored(about)
    if type(model).__name__ != "T5":
        raise ValueError(
            f"PEFT's folders are beside encoder-decoders; the network {name!r} of "
            f"{src} is of the kind {type(model).__name__!r}."
        )
    named = _base(src, about, base)
    compared = Path(named).is_dir()
    if compared:
        _check(named, found.base)
    elif verify:
        raise ValueError(f"--verify reads the base, and {named} is no folder here.")
    told = "" if compared else f"; {named} is no folder here and was not looked at"
    with new_folder(dst, peft.CONFIG) as folder:
        peft.write(folder, found.adapter, found.own, model, named)
        if verify:
            told = f"; {verification.compare(src, folder, network, 'float32')}"
    return (
        f"{src} (jaxalign, {name}: {found.adapter}) is written to {dst} (peft, beside "
        f"{named}){told}"
    )


def _base(src: str, about: Mapping[str, Any], base: str | None) -> str:
    """What the folder calls its base: a Hugging Face folder, or its name on the hub."""
    if base is not None:
        if Path(base).exists() and not huggingface.is_folder(base):
            raise ValueError(
                f"--base={base} is no Hugging Face folder, which peft loads: jaxalign "
                f"convert {base} FOLDER --format=hf makes one of it."
            )
        return os.path.abspath(base) if Path(base).is_dir() else base
    start = about.get("base", {}).get("from")
    if start is None:
        raise ValueError(
            f"{src} began with random weights, which are in no checkpoint of their "
            "own: give --base=FOLDER, a Hugging Face folder of its base."
        )
    if not huggingface.is_folder(start):
        raise ValueError(
            f"The base of {src} is {start}, no Hugging Face folder, which peft loads: "
            f"jaxalign convert {start} FOLDER --format=hf makes one; give it as "
            "--base=FOLDER."
        )
    return start


def _check(base: str, params: Mapping[str, Any]) -> None:
    """Refuses a base that is another network than the one under the adapter."""
    theirs = huggingface.open_folder(base).leaves
    ours = unstack(params)
    differing = {path for path in ours.keys() ^ theirs.keys()}
    for path in sorted(ours.keys() & theirs.keys()):
        a, b = ours[path], theirs[path]
        if a.shape != b.shape or not np.array_equal(a.read(), _float32(b.read())):
            differing.add(path)
            break
    if differing:
        raise ValueError(
            f"{base} is not the network that the adapter was trained beside: "
            f"{min(differing)} differs. Of a run, jaxalign convert RUN FOLDER "
            "--format=hf makes its folder, in float32."
        )


def _float32(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)
