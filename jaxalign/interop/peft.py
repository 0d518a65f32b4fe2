"""Adapters of PEFT (``adapter_config.json``, ``adapter_model.safetensors``), both ways.

LoRA, with rsLoRA and DoRA, IA3 and soft prompts (``PROMPT_TUNING``), of T5s whose
folder is at hand. Importing this module needs neither PyTorch nor peft.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from jaxalign import remote
from jaxalign.interop import huggingface, merging, peft_prompt, tensor_files
from jaxalign.interop.folders import Foreign, unstack
from jaxalign.interop.huggingface_config import names_of
from jaxalign.interop.leaves import Leaf, of_array
from jaxalign.interop.new_folder import new_folder
from jaxalign.models import adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What PEFT calls the parameters beside a module, and ours; True where theirs has the
# axes of ours in reverse.
_LORA = {
    "lora_A.weight": ("lora_a", True),
    "lora_B.weight": ("lora_b", True),
    "lora_magnitude_vector": ("magnitude", False),
}
# Settings under which PEFT computes something else, and the values that do not.
_PLAIN = {
    "bias": ("none", None),
    "modules_to_save": (None, [], {}),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
}


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter of PEFT.

    Attributes:
      adapter: its kind and settings.
      own: its parameters by path, layers apart, not read.
      base: where the network that it adapts is.
      foreign: that network.
    """

    adapter: adapters.Adapter
    own: Mapping[str, Leaf]
    base: Path
    foreign: Foreign

    def tree(self) -> dict[str, Any]:
        """The adapter's parameters, layers apart."""
        read = {path: leaf.read() for path, leaf in self.own.items()}
        return traverse_util.unflatten_dict(read, sep="/")

    def merged(self) -> Foreign:
        """The network with the adapter merged into it, leaf by leaf as it is read.

        A soft prompt, which cannot be, is one more leaf.
        """
        leaves = merging.merged(self.adapter, self.foreign.leaves, self.own)
        return dataclasses.replace(self.foreign, leaves=leaves)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path, here or in a bucket, is an adapter of PEFT, and no model."""
    if remote.is_remote(path):
        url = os.fspath(path)
        return remote.holds(url, CONFIG) and not remote.holds(url, huggingface.CONFIG)
    folder = Path(path)
    here = (folder / CONFIG).is_file()
    return here and not (folder / huggingface.CONFIG).is_file()


def open_folder(path: str | os.PathLike[str]) -> PeftAdapter:
    """An adapter and the network that it adapts; of tensors, names and shapes are read.

    Raises:
      FileNotFoundError: where the network, or a file of the adapter, is not at hand.
      ValueError: an adapter of another kind, tensors that do not fit the network.
    """
    folder = remote.copy_folder(path, lambda n: n.endswith((".json", ".safetensors")))
    config = tensor_files.read_json(folder / CONFIG)
    base = _base(folder, config)
    foreign = huggingface.open_folder(base)
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(
            f"{folder} has no {TENSORS}. Pickles (adapter_model.bin) can run code and "
            "are not opened: save the adapter again with a peft of today."
        )
    adapter = _adapter(folder, config)
    tensors = tensor_files.read_file(folder / TENSORS)
    if isinstance(adapter, adapters.SoftPrompt):
        width = foreign.shape.emb_dim
        own = peft_prompt.rows(folder / TENSORS, tensors, adapter.length, width)
        return PeftAdapter(adapter, own, base, foreign)
    own = _own(folder, tensors, adapter, foreign)
    adapter = dataclasses.replace(adapter, **_targets(folder, own, foreign))
    return PeftAdapter(adapter, own, base, foreign)


def write(
    path: str | os.PathLike[str],
    adapter: adapters.Adapter,
    own: Mapping[str, Any],
    model: Any,
    base: str | os.PathLike[str],
) -> None:
    """Writes a folder that ``PeftModel.from_pretrained`` reads, whole or not at all.

    Args:
      path: that does not exist or is an empty folder; it may be in a bucket.
      adapter: as of `jaxalign.training.checkpoints.load_adapter`.
      own: its parameters, in either layout.
      model: the network that it adapts.
      base: the Hugging Face folder or name of that network.

    Raises:
      FileExistsError: where something is there already.
      ValueError: where more was trained than the adapter.
    """
    if isinstance(adapter, adapters.SoftPrompt):
        tensors, settings = peft_prompt.stored(own)
    else:
        tensors, settings = _beside_kernels(adapter, own, model)
    config = {
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": os.fspath(base),
        "inference_mode": True,
        **settings,
    }
    with new_folder(path, CONFIG) as folder:
        tensor_files.write_folder(folder, tensors, "float32", shard=1 << 62)
        os.replace(folder / tensor_files.SINGLE, folder / TENSORS)
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(f"{text}\n", "utf-8")


def _beside_kernels(
    adapter: adapters.LoRA | adapters.IA3, own: Mapping[str, Any], model: Any
) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """The tensors and the settings of an adapter that is beside kernels."""
    modules = {
        path.removesuffix("/kernel"): source.name.removesuffix(".weight")
        for path, source in names_of(model.config)
        if path.endswith("/kernel")
    }
    back = {ours: (theirs, turn) for theirs, (ours, turn) in _LORA.items()}
    tensors, inputs, outputs = {}, set(), set()
    for name, leaf in sorted(unstack(own).items()):
        module, _, last = name.rpartition("/")
        if module not in modules or not adapters.is_adapter(name):
            raise ValueError(
                f"{name} was trained beside the adapter, and PEFT's folder has no "
                "place for it: write the merged network instead."
            )
        their = modules[module]
        (inputs if last == "gain_in" else outputs).add(their)
        if last in back:
            suffix, turned = back[last]
            leaf = leaf.transposed if turned else leaf
        else:
            suffix = "ia3_l"
            column = (1, -1) if last == "gain_in" else (-1, 1)
            leaf = _reshaped(leaf, column)
        tensors[f"{_PREFIX}{their}.{suffix}"] = leaf
    every = set(modules.values())
    config: dict[str, Any] = {
        "fan_in_fan_out": False,
        "target_modules": _short(inputs | outputs, every),
    }
    if isinstance(adapter, adapters.LoRA):
        config |= {
            "peft_type": "LORA",
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_dropout": adapter.dropout,
            "use_rslora": adapter.rslora,
            "use_dora": adapter.dora,
            "bias": "none",
        }
    else:
        config |= {
            "peft_type": "IA3",
            "feedforward_modules": _short(inputs, every),
            "init_ia3_weights": True,
        }
    return tensors, config


def _base(folder: Path, config: Mapping[str, Any]) -> Path:
    """The folder of the adapted network."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"{folder / CONFIG} names no base_model_name_or_path: write the folder of "
            "the network that the adapter is for."
        )
    found = [path for path in (Path(named), folder / named) if path.is_dir()]
    if not found:
        raise FileNotFoundError(
            f"{folder} is an adapter of {named!r}, which is no folder here: download "
            f"it and write its folder as base_model_name_or_path in {CONFIG}."
        )
    return found[0]


def _adapter(folder: Path, config: Mapping[str, Any]) -> adapters.Adapter:
    """Kind and settings; the targets come from the tensors."""
    kind = str(config.get("peft_type", "")).rsplit(".", 1)[-1].upper()
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise ValueError(
                f"{folder / CONFIG}: {name}={config[name]!r} is not supported; merge "
                "the adapter with peft (merge_and_unload) and give the whole model."
            )
    try:
        if kind == "LORA":
            return adapters.LoRA(
                rank=config["r"],
                alpha=float(config["lora_alpha"]),
                dropout=float(config.get("lora_dropout") or 0.0),
                rslora=bool(config.get("use_rslora")),
                dora=bool(config.get("use_dora")),
            )
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks {error}.") from error
    if kind == "IA3":
        return adapters.IA3()
    if kind == peft_prompt.KIND:
        return peft_prompt.adapter(folder / CONFIG, config)
    raise ValueError(
        f"{folder / CONFIG}: peft_type must be LORA, IA3 or {peft_prompt.KIND}, got "
        f"{kind or None!r}; where it can be merged, merge it with peft "
        "(merge_and_unload)."
    )


def _own(
    folder: Path,
    tensors: Mapping[str, Leaf],
    adapter: adapters.Adapter,
    foreign: Foreign,
) -> dict[str, Leaf]:
    """The adapter's parameters by path; every name and shape is checked."""
    modules = {
        source.name.removesuffix(".weight"): path.removesuffix("/kernel")
        for path, source in foreign.names.items()
        if path.endswith("/kernel")
    }
    own: dict[str, Leaf] = {}
    for name, leaf in tensors.items():
        module, suffix = _parts(name.removeprefix(_PREFIX))
        if module not in modules:
            raise ValueError(
                f"{folder / TENSORS}: {name!r} is beside no kernel of the network in "
                f"{CONFIG}'s base_model_name_or_path."
            )
        ours = modules[module]
        if suffix in _LORA:
            last, turned = _LORA[suffix]
            leaf = leaf.transposed if turned else leaf
        else:  # of IA3, (1, in) or (out, 1)
            last = "gain_in" if leaf.shape[0] == 1 else "gain"
            leaf = _reshaped(leaf, (-1,))
        inner, outer = foreign.leaves[f"{ours}/kernel"].shape
        rank = getattr(adapter, "rank", 0)
        wanted = {
            "lora_a": (inner, rank),
            "lora_b": (rank, outer),
            "magnitude": (outer,),
            "gain": (outer,),
            "gain_in": (inner,),
        }[last]
        if leaf.shape != wanted:
            raise ValueError(
                f"{folder / TENSORS}: {name!r} must give {wanted} for {ours}, got "
                f"{leaf.shape}; does {CONFIG} belong to it?"
            )
        own[f"{ours}/{last}"] = leaf
    complete = [{"gain"}, {"gain_in"}]
    if isinstance(adapter, adapters.LoRA):
        complete = [{"lora_a", "lora_b", *["magnitude"] * adapter.dora}]
    held: dict[str, set[str]] = {}
    for path in own:
        module, _, last = path.rpartition("/")
        held.setdefault(module, set()).add(last)
    for module, names in held.items():
        if names not in complete:
            raise ValueError(
                f"{folder / TENSORS}: beside {module} expected {sorted(complete[0])}, "
                f"found {sorted(names)}."
            )
    if not own:
        raise ValueError(f"{folder / TENSORS} holds no tensors.")
    return own


def _parts(name: str) -> tuple[str, str]:
    """A tensor's name as its module's and the rest."""
    for suffix in (*_LORA, "ia3_l"):
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
    return name, ""


def _targets(folder: Path, own: Mapping[str, Leaf], foreign: Foreign) -> dict[str, str]:
    """The expressions that name the adapted modules."""
    modules = {path.rpartition("/")[0] for path in own}
    found = {"targets": _pattern(modules)}
    inputs = {p.rpartition("/")[0] for p in own if p.endswith("/gain_in")}
    if any(path.endswith(("/gain", "/gain_in")) for path in own):
        found["inputs"] = _pattern(inputs) if inputs else "(?!)"
    kernels = [p.removesuffix("/kernel") for p in foreign.leaves if "/kernel" in p]
    matched = {name for name in kernels if re.search(found["targets"], name)}
    if matched != modules:
        raise ValueError(
            f"{folder} adapts some layers of a stack only, which is not supported; "
            "merge it with peft (merge_and_unload) and give the whole model."
        )
    return found


def _pattern(modules: set[str]) -> str:
    kinds = sorted({re.sub(r"layers_\d+", "[^/]+", name) for name in modules})
    return f"^({'|'.join(kinds)})$"


def _short(modules: set[str], every: set[str]) -> list[str]:
    """Last names where those mean these modules and no others, else whole names."""
    last = {name.rpartition(".")[2] for name in modules}
    meant = {name for name in every if name.rpartition(".")[2] in last}
    return sorted(last if meant == modules else modules)


def _reshaped(leaf: Leaf, shape: tuple[int, ...]) -> Leaf:
    return of_array(leaf.read().reshape(shape))  # a vector
