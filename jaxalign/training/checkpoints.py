"""Checkpoints: sets of named networks, self-describing, compared when they are read.

``RUN_DIR/checkpoints/<step>/`` holds one Orbax item for each network, ``state`` (the
optimizer's state, the step, running statistics) and ``meta``: JSON with the step, data
position and fingerprint, reward statistics, the vocabulary, fingerprints of files
(`jaxalign.training.damage`), which network is the ``main`` one, and of each its kind,
shape and fingerprint. A frozen network that came from a checkpoint is described, and
read from there again; so is the ``base`` of an adapter, beside which a checkpoint holds
what trains. `jaxalign.training.checkpoint_writer` writes them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from jaxalign import models, remote, user_code, vocabularies
from jaxalign.cluster import mesh as meshes
from jaxalign.models import adapters
from jaxalign.training import damage, foreign, remote_checkpoints
from jaxalign.training.damage import DamagedCheckpointError
from jaxalign.training.fingerprints import of_network, params_fingerprint
from jaxalign.training.partition import REFERENCE, Partition, parted

_log = logging.getLogger(__name__)
_FOLDER = remote_checkpoints.FOLDER
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as loaded from a checkpoint: all that inference needs.

    Attributes:
      model: the module.
      params: its parameters.
      vocabulary: of the run.
      meta: of the checkpoint.
      path: of the checkpoint.
      name: in it.
    """

    model: Any
    params: Any
    vocabulary: Any
    meta: dict[str, Any]
    path: Path | None
    name: str = "policy"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters as they were saved."""
        return self.meta["networks"][self.name]["fingerprint"]


def load(
    path: str | Path,
    network: str | None = "policy",
    mesh: jax.sharding.Mesh | None = None,
) -> Network:
    """Loads a network of a checkpoint; an adapter is merged into its base.

    Args:
      path: a run directory (its newest checkpoint is taken) or a checkpoint; a Hugging
        Face folder; a T5X checkpoint; told by content.
      network: its name; None: the checkpoint's main one.
      mesh: where its parameters are spread; one device by default.

    Raises:
      DamagedCheckpointError: when it is not what was written; the message names the
        file.
      FileNotFoundError: when there is no checkpoint.
      ValueError: when there is no such network, with those there are.

    Example::

        policy = checkpoints.load("runs/dpo")
        policy.model.apply({"params": policy.params}, batch)
    """
    other = foreign.opened(path)
    meta = foreign.meta(other) if other else read_meta(path)
    name = network or meta["main"]
    about = description(meta, name, path)
    if "from" in about:
        return _from_its_start(path, name, about, mesh)
    model = models.restored(about)
    _log.info("Network of %s: %s", path, models.describe(model))
    like = on_mesh(model, mesh)
    if other:
        params, vocabulary = other.params(like), other.foreign.vocabulary
        return Network(model, params, vocabulary, meta, other.path, name)
    folder = resolve(path)
    # Before it is decoded: decoders of damaged files print, wait or crash.
    damage.check_files(folder, meta, name)
    if "adapter" in about:
        params = adapters.merge_in_place(*_with_adapter(path, folder, meta, name, mesh))
    else:
        params = _read_network(folder, meta, name, like)
    vocabulary = vocabularies.from_json(meta["vocabulary"], folder.parents[1])
    return Network(model, params, vocabulary, meta, folder, name)


def _read_network(folder: Path, meta: dict[str, Any], name: str, like: Any) -> Any:
    """What a checkpoint holds of a network, compared with what was written."""
    params = patiently(lambda: read_item(folder, meta, name, like))
    about = meta["networks"][name]
    found = of_network(about, params_fingerprint(params))
    damage.compare(folder, meta, name, about["fingerprint"], found)
    return params


class Adapted(NamedTuple):
    """A network with an adapter, apart.

    Attributes:
      adapter: its kind and settings.
      base: the network's own parameters.
      own: the adapter's, and whatever else was trained.
    """

    adapter: adapters.Adapter
    base: Any
    own: Any


def load_adapter(
    path: str | Path, network: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> Adapted:
    """An adapter of a checkpoint and its base, not merged.

    Raises:
      ValueError: when the network has no adapter, or its base is another one now.
      FileNotFoundError: when the base is gone.
    """
    meta, folder = read_meta(path), resolve(path)
    name = network or meta["main"]
    if "adapter" not in description(meta, name, path):
        raise ValueError(f"The network {name!r} of {path} has no adapter.")
    damage.check_files(folder, meta, name)
    return _with_adapter(path, folder, meta, name, mesh)


def _with_adapter(
    path: str | Path, folder: Path, meta: dict[str, Any], name: str, mesh: Any
) -> Adapted:
    about = meta["networks"][name]
    partition = Partition.restored(name, about)
    model = models.restored(about)
    base_like = on_mesh(model, mesh)
    like = on_mesh(model, mesh, partition)
    trained, resting = partition.split({name: like})
    if "base" not in about:
        found = _read_network(folder, meta, name, like)
        own, rest = parted(found, trained[name])
        return Adapted(partition.adapter, rest, own)
    own = _read_network(folder, meta, name, trained[name])
    found = load(*base(path, name, about["base"]), mesh)
    params = found.params
    if found.model.config.scan_layers != model.config.scan_layers:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, base_like)
        params = jax.device_put(models.relayout(params, base_like), shardings)
    return Adapted(partition.adapter, params, own)


def base(path: str | Path, name: str, told: Mapping[str, str]) -> tuple[str, str]:
    """The checkpoint under an adapter, and the name of the network there.

    Args:
      path: of the checkpoint that holds the adapter.
      name: of the network that it is beside.
      told: what ``meta`` says of its base.

    Raises:
      FileNotFoundError: when it is gone.
      ValueError: when it holds other parameters now.
    """
    start = told["from"]
    try:
        meta = read_meta(start)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} holds an adapter of {start}, which is gone: put it back, "
            f"or a link to where it is. {damage.first_line(error)}"
        ) from error
    named = source(meta, name)
    found = description(meta, named, start)["fingerprint"]
    if found != told["fingerprint"]:
        raise ValueError(
            f"{path} holds an adapter of {start}, which holds other parameters "
            f"now: expected the fingerprint {told['fingerprint'][:12]}, found "
            f"{found[:12]}. Put back what the adapter was trained on."
        )
    return start, named


def newest(
    path: str | Path,
    network: str | None = "policy",
    mesh: jax.sharding.Mesh | None = None,
) -> Network:
    """As `load`, of the newest intact checkpoint of a run directory.

    A damaged one is passed over, with a warning, where the run has an older one.

    Raises:
      DamagedCheckpointError: when the checkpoint named, or all of a run, are damaged.
    """
    return _newest_intact(path, lambda path: load(path, network, mesh))


def chat_template(path: str | Path) -> str | None:
    """The template that a policy learnt chats by; None where it says none."""
    if foreign.opened(path):
        return None
    return _newest_intact(path, lambda path: read_meta(path)).get("chat_template")


def fingerprint(path: str | Path, network: str | None = "policy") -> str:
    """SHA-256 of the parameters that `newest` would load; only ``meta`` is read."""
    meta = newest_meta(path)
    return description(meta, network or meta["main"], path)["fingerprint"]


def newest_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` of the checkpoint that `newest` would load."""
    return _newest_intact(path, lambda path: read_meta(path))


def description(
    meta: Mapping[str, Any], network: str, path: str | Path
) -> dict[str, Any]:
    """What a checkpoint says of one of its networks: kind, shape, fingerprint.

    Raises:
      ValueError: when it does not hold such a network.
    """
    if network in meta["networks"]:
        return meta["networks"][network]
    held = meta["networks"]
    raise ValueError(
        f"{path} holds no network {network!r}.{user_code.hint(network, held)} It has "
        f"{sorted(held)}; the main one is {meta['main']!r}."
    )


def _from_its_start(
    path: str | Path, name: str, about: Mapping[str, Any], mesh: Any
) -> Network:
    """A network that no step changed: read where it came from."""
    found = load(about["from"], source(read_meta(about["from"]), name), mesh)
    theirs = models.stored(found.model)
    same = all(about[key] == theirs[key] for key in ("kind", "options", "shape"))
    if not same or found.fingerprint != about["fingerprint"]:
        raise ValueError(
            f"The network {name!r} of {path} is one that no step changed, made from "
            f"{about['from']}, which holds another one now or only a part of it."
        )
    return found


def source(meta: Mapping[str, Any], name: str) -> str:
    """The network of a checkpoint that a run's network of this name starts from.

    That of the same name, else the main one; a reference from what is a policy.
    """
    wanted = "policy" if name == REFERENCE else name
    return wanted if wanted in meta["networks"] else meta["main"]


def network_in_gin(path: str | Path) -> str | None:
    """Gin statements that make a run's network and vocabulary those of a checkpoint.

    None where it says nothing of its vocabulary.
    """
    meta = read_meta(path)
    if meta["vocabulary"] is None:
        return None
    shape = meta["networks"][meta["main"]]["shape"]
    fields = {name: value for name, value in shape.items() if name != "dropout_rate"}
    lines = (f"  {name} = {value!r}" for name, value in fields.items())
    return "\n".join(
        (
            "from __gin__ import dynamic_registration",
            "from jaxalign import models",
            "from jaxalign.training import checkpoints",
            "VOCABULARY = @checkpoints.vocabulary()",
            f"checkpoints.vocabulary.path = {str(path)!r}",
            "models.T5Config:",
            *lines,
            "",
        )
    )


def vocabulary(path: str) -> Any:
    """The vocabulary of a checkpoint of any format."""
    if other := foreign.opened(path):
        return other.foreign.vocabulary
    folder = resolve(path)
    return vocabularies.from_json(read_meta(path)["vocabulary"], folder.parents[1])


def on_mesh(
    model: Any, mesh: jax.sharding.Mesh | None, partition: Partition | None = None
) -> Any:
    """A network's parameters as shapes with shardings; on one device without a mesh.

    With those of an adapter, if the partition has one.
    """
    shapes, axes = models.shapes(model), models.logical_axes(model)
    if partition is not None:
        main, key = partition.main, jax.random.key(0)
        shapes = jax.eval_shape(partition.with_adapter, {main: shapes}, key)[main]
        axes = partition.with_axes({main: axes})[main]
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    else:
        shardings = meshes.param_shardings(mesh, axes, shapes)
    return jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
        shapes,
        shardings,
    )


def patiently(read: Callable[[], _T]) -> _T:
    """Repeats a read that fails; of several processes, none may read alone."""
    return damage.patiently(read) if jax.process_count() == 1 else read()


def read_item(folder: Path, meta: dict[str, Any], item: str, like: Any) -> Any:
    """Reads an item as arrays of the shapes and shardings of `like`."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / item, like)
    except Exception as error:
        meant = damage.explain(folder, meta, item, error)
        if meant is not error or not isinstance(error, ValueError | KeyError):
            raise meant from error
        raise ValueError(
            f"{folder / item} is intact, but does not fit this model and optimizer "
            "(give another --run_dir, or the settings the run was started with): "
            f"{damage.first_line(error)}"
        ) from error


def resolve(path: str | Path) -> Path:
    """The checkpoint folder a path means: itself, or the newest of a run directory.

    Of a remote one it is a local copy with what inference reads.

    Raises:
      FileNotFoundError: saying what was looked for, and where.
    """
    if remote.is_remote(path):
        return remote_checkpoints.copy_networks(str(path))
    path = Path(path).absolute()
    named = path.parent.name == _FOLDER and path.name.isdigit() and path.is_dir()
    if named or (path / "meta").is_dir():
        return path
    steps = saved_steps(path)
    if not steps:
        raise FileNotFoundError(
            f"No checkpoint at {path}: expected a run directory with "
            f"{_FOLDER}/<step>/, or one of those steps; a Hugging Face folder; or a "
            f"T5X checkpoint. {_held(path)}"
        )
    return path / _FOLDER / str(steps[-1])


def _held(path: Path) -> str:
    if not path.exists():
        return "There is no such path."
    if path.is_file():
        return "It is a file."
    names = sorted(child.name for child in path.iterdir())
    return f"It holds {', '.join(names[:5]) or 'nothing'}{', ...' * (len(names) > 5)}."


def saved_steps(run_dir: str | Path) -> list[int]:
    """The steps of which a run directory has a checkpoint, ascending."""
    names = (p.name for p in (Path(run_dir) / _FOLDER).glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` item of a checkpoint or run directory.

    Raises:
      DamagedCheckpointError: when it is not what was written.
    """
    if other := foreign.opened(path):
        return foreign.meta(other)
    return damage.read_meta(resolve(path))


def verify(path: str | Path, network: str = REFERENCE) -> None:
    """Compares a network's files with what was written, without loading them.

    Args:
      path: a run directory or a checkpoint.
      network: of the run that starts with it; see `source`.

    Raises:
      DamagedCheckpointError: naming the file that differs.
    """
    if foreign.opened(path):
        return  # which lists no SHA-256 of its files
    folder = resolve(path)
    meta = damage.read_meta(folder)
    damage.check_files(folder, meta, source(meta, network))


def run_meta(run_dir: str | Path) -> dict[str, Any] | None:
    """The newest readable ``meta`` of a run directory; None if it has none.

    It only reads: a folder that turns out to be another run's stays as it is.
    """
    for step in reversed(saved_steps(run_dir)):
        try:
            return read_meta(Path(run_dir) / _FOLDER / str(step))
        except Exception:  # noqa: BLE001 - any damage, which restoring tells
            continue
    return None


def _newest_intact(path: str | Path, read: Callable[[str | Path], _T]) -> _T:
    try:
        return read(path)
    except DamagedCheckpointError as error:
        for older in _older(path):
            try:
                found = read(older)
            except DamagedCheckpointError:
                continue
            _log.warning("%s Using %s instead.", error, older)
            return found
        raise


def _older(path: str | Path) -> list[str]:
    """The checkpoints of a run directory but the newest, the newest first."""
    if remote.is_remote(path):
        run_dir, steps = str(path).rstrip("/"), remote_checkpoints.complete(str(path))
    else:
        run_dir, steps = str(Path(path).absolute()), saved_steps(path)
    return [f"{run_dir}/{_FOLDER}/{step}" for step in reversed(steps[:-1])]
