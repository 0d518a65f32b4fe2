"""The README of an exported model: what is known of it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxalign import models
from jaxalign.training import run_directory

# What ``meta`` says, and how a card calls it.
_FACTS = {
    "objective": "Objective",
    "step": "Steps",
    "batch_size": "Batch size",
    "seed": "Seed",
    "feature_lengths": "Lengths",
    "data_fingerprint": "Data fingerprint",
}


def text(
    meta: Mapping[str, Any],
    model: nn.Module,
    network: str,
    made_from: str,
    run_dir: Path | None = None,
) -> str:
    """A model card in Markdown, with the front matter that the Hub reads.

    Args:
      meta: of the checkpoint.
      model: the network that is exported.
      network: its name in the checkpoint.
      made_from: how the card calls the checkpoint.
      run_dir: of the run, where it is at hand: its last training numbers.
    """
    encoder = not hasattr(model, "decode")
    lines = ["---", "library_name: transformers", "tags:", "- jaxalign", "- t5"]
    objective = meta.get("objective")
    if objective:
        lines.append(f"- {str(objective).lower()}")
    lines += ["---", "", f"# {made_from}", ""]
    how = f"trained with {objective}" if objective else "converted"
    lines += [f"A T5 of {models.describe(model)}, {how} by jaxalign.", ""]
    facts = dict(_facts(meta, network))
    if facts:
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in facts.items()]
        lines.append("")
    numbers = run_directory.last_metrics(run_dir) if run_dir else {}
    if numbers:
        lines += ["## Last training numbers", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value:.6g} |" for name, value in numbers.items()]
        lines.append("")
    lines += ["## How to load", "", "```python"]
    if encoder:
        lines += ["from sentence_transformers import SentenceTransformer", ""]
        lines += ['model = SentenceTransformer("THIS_FOLDER")']
    else:
        lines += ["from transformers import AutoModelForSeq2SeqLM, AutoTokenizer", ""]
        lines += ['model = AutoModelForSeq2SeqLM.from_pretrained("THIS_FOLDER")']
        lines += ['tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")']
    lines += ["```", "", "or, in jaxalign:", "", "```python", "import jaxalign", ""]
    return "\n".join([*lines, 'policy = jaxalign.load("THIS_FOLDER")', "```", ""])


def _facts(meta: Mapping[str, Any], network: str) -> Iterator[tuple[str, str]]:
    for key, name in _FACTS.items():
        value = meta.get(key)
        if value not in (None, {}, [], 0):
            yield name, value if isinstance(value, str) else json.dumps(value)
    for name, value in (meta.get("parents") or {}).items():
        if value:
            yield f"Parent ({name})", f"`{value}`"
    about = meta["networks"][network]
    if about.get("fingerprint"):
        yield "Parameters (SHA-256)", f"`{about['fingerprint']}`"
