"""``jaxalign convert``: a checkpoint of any format as one of another.

Parameters are read, and written, one after the other: memory holds a few of them. The
destination gets its name when it is whole and, if asked for, verified.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn

from jaxalign import models
from jaxalign.inference import convert_adapter, model_card
from jaxalign.inference import verify as verification
from jaxalign.interop import huggingface, peft_prompt, t5x, tokenizer_files
from jaxalign.interop.folders import flat
from jaxalign.interop.new_folder import new_folder
from jaxalign.models import adapted
from jaxalign.training import checkpoints, leafwise, new_run
from jaxalign.training.remote_checkpoints import FOLDER
from jaxalign.vocabularies import Vocabulary

FORMATS = ("hf", "t5x", "jaxalign")


def convert(
    src: str,
    dst: str,
    *,
    format: Literal["hf", "t5x", "jaxalign", "peft"],
    dtype: Literal["float32", "bfloat16"] = "float32",
    network: str | None = None,
    vocabulary: str | None = None,
    base: str | None = None,
    verify: bool = False,
) -> str:
    """Convert a checkpoint to another format, parameter by parameter.

    Args:
      src: a jaxalign run or checkpoint, a Hugging Face folder or a T5X checkpoint,
        here or in a bucket
      dst: the folder to make, here or in a bucket; one that holds something is refused
      format: of DST: a folder for transformers, a checkpoint for T5X, a jaxalign run;
        of a run that trained an adapter, that alone as a folder for peft
      dtype: of the parameters on disk
      network: which one of a jaxalign checkpoint; default: its main one
      vocabulary: a SentencePiece file, a tokenizer.json, a Hugging Face folder, a
        jaxalign run or the word bytes, where SRC has none at hand
      base: with --format=peft, the network that the adapter is beside, a Hugging Face
        folder or its name on the hub; default: what the run started from
      verify: compare what both compute of random inputs; where they differ by more
        than rounding, DST is not made

    Returns:
      What was made, in words.

    Raises:
      FileExistsError: where DST holds something.
      ValueError: for a network or a vocabulary that the format has no place for.
      VerificationError: where DST computes something else.
    """
    if format == "peft":
        if dtype != "float32" or vocabulary is not None:
            raise ValueError("--format=peft takes neither --dtype nor --vocabulary.")
        return convert_adapter.convert(src, dst, network, base, verify)
    if base is not None:
        raise ValueError(f"--base is for --format=peft, not for --format={format}.")
    found = leafwise.opened(src, network)
    used = _vocabulary(found, src, vocabulary)
    if used is None and format != "t5x":
        raise ValueError(_missing(src, found))
    last = (huggingface.CONFIG, f"{FOLDER}/{_step(found.meta)}.json")
    last += (f"checkpoint_{_step(found.meta)}/checkpoint",)
    told = ""
    with new_folder(dst, *last) as folder:
        write(
            folder,
            format,
            found.leaves,
            found.model,
            used,
            found.meta,
            name=found.name,
            dtype=dtype,
            made_from=f"{Path(src).name} ({found.format})",
            run_dir=_run_dir(found),
        )
        if verify:
            told = f"; {verification.compare(src, folder, network, dtype)}"
    return (
        f"{src} ({found.format}, {found.name}: {models.describe(found.model)}) is "
        f"written to {dst} ({format}, {dtype}){told}"
    )


def write(
    path: str | os.PathLike[str],
    format: str,
    params: Mapping[str, Any],
    model: nn.Module,
    vocabulary: Vocabulary | None,
    meta: Mapping[str, Any],
    *,
    name: str = "policy",
    dtype: str = "float32",
    made_from: str,
    run_dir: Path | None = None,
) -> None:
    """Writes a network in one of `FORMATS`.

    Args:
      path: that does not exist or is an empty folder.
      format: ``"hf"``, ``"t5x"`` or ``"jaxalign"``.
      params: nested or flat by path; arrays or `Leaf`.
      model: the network, in their layout.
      vocabulary: of the network; a T5X checkpoint may do without.
      meta: of the checkpoint that they come from.
      name: of the network in it.
      dtype: of the parameters on disk.
      made_from: what a card and a manifest call it.
      run_dir: of the run, where it is at hand.

    Raises:
      ValueError: for a network that the format has no place for.
    """
    if peft_prompt.PATH in flat(params):
        raise ValueError(adapted.UNMERGED)
    if format == "hf":
        card = model_card.text(meta, model, name, made_from, run_dir)
        huggingface.write(path, params, model, vocabulary, dtype=dtype, card=card)
    elif format == "jaxalign":
        new_run.write(
            path,
            params,
            model,
            vocabulary,
            name=name,
            dtype=dtype,
            meta=meta,
            made_from=made_from,
        )
    elif format != "t5x":
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    elif type(model).__name__ != "T5":
        raise ValueError(
            f"T5X's checkpoints hold encoder-decoders; the network {name!r} is of the "
            f"kind {type(model).__name__!r}. Give another --network, or --format=hf or "
            "jaxalign."
        )
    else:
        t5x.save(
            path,
            params,
            step=_step(meta),
            dtype=dtype,
            shape=model.config,
            vocabulary=vocabulary,
        )


def _step(meta: Mapping[str, Any]) -> int:
    return int(meta.get("step") or 0)


def _run_dir(found: leafwise.Stored) -> Path | None:
    """Of the folders of a run, the one that holds what it logged."""
    return found.path.parents[1] if found.format == "jaxalign" else None


def _vocabulary(
    found: leafwise.Stored, src: str, given: str | None
) -> Vocabulary | None:
    if given is None:
        return found.vocabulary
    rows = found.model.config.vocab_size
    extra = (found.vocabulary_told or {}).get("extra_ids")
    made = tokenizer_files.at(given, rows, extra)
    if made is None:
        made = checkpoints.vocabulary(given)
    if made is None:
        raise ValueError(f"--vocabulary={given} has no vocabulary of its own at hand.")
    tokenizer_files.check_size(given, made, rows)
    return made


def _missing(src: str, found: leafwise.Stored) -> str:
    told = found.vocabulary_told or {}
    named = told.get("sentencepiece_model_file") or told.get("class")
    says = f" (its gin file names {named})" if named else ""
    return (
        f"{src} has no vocabulary at hand{says}: give --vocabulary=PATH, its "
        "SentencePiece file, a tokenizer.json, a Hugging Face folder of the same "
        "family, a jaxalign run, or --vocabulary=bytes."
    )
