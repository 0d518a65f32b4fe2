"""Soft prompts as PEFT keeps them: ``PROMPT_TUNING``, a tensor and two numbers.

Of an encoder-decoder peft puts ``num_virtual_tokens`` rows before the encoder's tokens,
and none before the decoder's. With ``num_transformer_submodules = 2``, its default
there, the tensor has as many rows again, which peft never reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.interop.folders import flat
from jaxalign.interop.leaves import Leaf, of_array
from jaxalign.models.adapted import SOFT_PROMPT
from jaxalign.models.soft_prompt import SoftPrompt

KIND = "PROMPT_TUNING"
PATH = f"token_embedder/{SOFT_PROMPT}"  # of the rows among our parameters
TENSOR = "prompt_embeddings"  # in theirs
_TASK = "SEQ_2_SEQ_LM"


def adapter(where: Any, config: Mapping[str, Any]) -> SoftPrompt:
    """The adapter that a configuration describes.

    Args:
      where: its file, for messages.
      config: what it says.
    """
    task = str(config.get("task_type")).rsplit(".", 1)[-1]
    if task != _TASK:
        raise ValueError(
            f"{where}: a soft prompt of task_type={config.get('task_type')!r} is not "
            f"supported, expected {_TASK!r}: a network with a decoder."
        )
    length = config.get("num_virtual_tokens")
    if type(length) is not int or length < 1:
        raise ValueError(
            f"{where}: num_virtual_tokens must be a whole number of at least 1, got "
            f"{length!r}."
        )
    return SoftPrompt(length)


def rows(
    where: Any, tensors: Mapping[str, Leaf], length: int, width: int
) -> dict[str, Leaf]:
    """The adapter's parameters by path; names and shapes are checked."""
    if set(tensors) != {TENSOR}:
        raise ValueError(
            f"{where} must hold {TENSOR!r} alone, the rows of a soft prompt; it holds "
            f"{sorted(tensors)[:4]}."
        )
    leaf = tensors[TENSOR]
    if leaf.shape not in ((length, width), (2 * length, width)):
        raise ValueError(
            f"{where}: {TENSOR!r} must be {(length, width)}, or with a half that peft "
            f"does not read {(2 * length, width)}; got {leaf.shape}. Does the "
            "configuration belong to it?"
        )
    return {PATH: of_array(leaf.read((slice(0, length), slice(0, width))))}


def stored(own: Mapping[str, Any]) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """The tensors and the settings of a folder of PEFT.

    Raises:
      ValueError: where more was trained than the rows.
    """
    leaves = flat(own)
    if beside := sorted(set(leaves) - {PATH}):
        raise ValueError(
            f"{beside[0]} was trained beside the soft prompt, and PEFT's folder has no "
            "place for it: keep the run."
        )
    settings = {
        "peft_type": KIND,
        "task_type": _TASK,
        "num_virtual_tokens": leaves[PATH].shape[0],
        "token_dim": leaves[PATH].shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",  # of no consequence once it is trained
    }
    return {TENSOR: leaves[PATH]}, settings
