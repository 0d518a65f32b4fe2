"""From what the user named to what the loop is fed: caches, plans and feeds."""

from __future__ import annotations

import dataclasses
import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import batch as batches
from jaxalign import configs, remote, vocabularies
from jaxalign import data as data_lib
from jaxalign.data import synthetic, too_long
from jaxalign.data.augment import Augment
from jaxalign.objectives import Objective

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where the examples come from and how they are cut into rows.

    Attributes:
      data: a file of rows, a folder or a glob of them (JSONL, CSV, TSV, Parquet,
        TFRecord), here or in a bucket, a registered task, ``task:file``, a prepared
        folder, ``synthetic:TASK`` (`jaxalign.data.synthetic`) or a mixture
        ``{any of these: rate}``.
      mixture_or_task_name: T5X's name for a registered task; in place of `data`.
      feature_lengths: ``{"inputs": ..., "targets": ...}``, the longest prompt and
        response in tokens; longer ones are truncated and counted.
      batch_size: encoder rows per step, over all devices.
      eval_data: like `data`; None splits `eval_fraction` off `data`, by prompt. Of a
        prepared folder it is the validation split, if there is one.
      eval_fraction: share of the prompts held out when there is no `eval_data`.
      field_map: our field names to the file's.
      desirable_above: rewards above it are thumbs up where a row has no label.
      task_options: options of a registered data set, such as UltraFeedback's aspect.
      module: a Python module, or a file ``path/to/tasks.py``, to import first; it
        registers seqio tasks.
      on_bad_row: ``"error"`` stops with a list of the bad rows; ``"skip"`` counts them.
      packing: an encoder row holds ``packing * inputs`` tokens, and each of its
        decoder rows ``packing * targets``; None puts one example in each row.
      decoder_rows: beside each encoder row; None: the most responses of any example.
      max_rows: read only so many examples; None reads all.
      split: the split of a registered task.
      eval_split: the split of a registered task used for evaluation, if it has one.
      shuffle: whether rows are shuffled each epoch.
      cache_dir: where tokenised caches and reference log-probabilities are kept.
      seed: of shuffling.
      split_seed: of the held-out split; the same for all runs, or a prompt held out by
        one would be trained on by the next.
      beam_options: of Apache Beam, to tokenise files on it; None: in this process.
      augment: ``augment(row, rng) -> row`` of the same lengths, called each time a row
        is fed (`jaxalign.data.augment`).
      chat_template: makes texts of rows of chat messages: a name, a file or the text of
        a Jinja2 template (`jaxalign.data.chat_template`); None: the default one.
      truncate: which side of what is too long is cut off, ``"start"`` or ``"end"``, or
        ``{"inputs": side, "targets": side}``; None: the end, of dialogues the start.
      on_too_long: ``"truncate"``; ``"skip"`` leaves out rows with a prompt or response
        longer than `feature_lengths`; ``"error"`` lists them and stops.
    """

    data: str | Mapping[str, float] | None = None
    mixture_or_task_name: str | None = None
    feature_lengths: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"inputs": 128, "targets": 128}
    )
    batch_size: int = 32
    eval_data: str | None = None
    eval_fraction: float = 0.05
    field_map: Mapping[str, str] | None = None
    desirable_above: float | None = None
    task_options: Mapping[str, Any] | None = None
    module: str | None = None
    on_bad_row: str = "error"
    packing: int | None = 2
    decoder_rows: int | None = None
    max_rows: int | None = None
    split: str = "train"
    eval_split: str | None = None
    shuffle: bool = True
    cache_dir: str = "~/.cache/jaxalign"
    seed: int = 0
    split_seed: int = 0
    beam_options: str | None = None
    augment: Augment | None = None
    chat_template: str | None = None
    truncate: too_long.Truncate = None
    on_too_long: str = "truncate"

    def __post_init__(self) -> None:
        if (self.data is None) == (self.mixture_or_task_name is None):
            raise ValueError(
                "Give the training data as exactly one of DATA (a file: "
                "--data=my.jsonl) and MIXTURE_OR_TASK_NAME (a registered "
                f"task); got {self.data!r} and {self.mixture_or_task_name!r}."
            )
        for name, value in (("DATA", self.data), ("EVAL_DATA", self.eval_data)):
            if isinstance(value, list | tuple | set):
                raise ValueError(
                    f"{name} must be one text, got a {type(value).__name__}: name "
                    "several files with a glob, 'part-*.jsonl', or DATA as a mixture, "
                    "{'a.jsonl': 1.0, 'b.jsonl': 1.0}."
                )
        lengths = dict(self.feature_lengths)
        if set(lengths) != {"inputs", "targets"} or min(lengths.values()) < 2:
            raise ValueError(
                "TASK_FEATURE_LENGTHS must be {'inputs': n, 'targets': m} with "
                f"n, m >= 2; got {lengths}."
            )
        too_long.check(self.truncate, self.on_too_long)

    @property
    def cache_folder(self) -> Path:
        return remote.local_only(self.cache_dir, "CACHE_DIR")

    @property
    def synthetic(self) -> bool:
        """Whether the rows are made on the fly."""
        return isinstance(self.data, str) and self.data.startswith(synthetic.PREFIX)

    def sources(self) -> dict[str, float]:
        """The training data by name, with mixing rates."""
        if isinstance(self.data, Mapping):
            return {str(k): float(v) for k, v in self.data.items()}
        return {str(self.data or self.mixture_or_task_name): 1.0}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The feeds of a run, and what the checkpoint must remember of them."""

    train: data_lib.Feed
    evaluation: data_lib.Feed | None
    reward_stats: tuple[float, float] | None
    vocabulary: vocabularies.Vocabulary
    packed: bool = True

    def evaluation_bins(self, steps: int | None) -> list[int] | None:
        """The bins that an evaluation of so many batches looks at; None: all.

        Always the same ones, from all over the held-out data: a packer's order is mixed
        already, unlike that of a file or of several sources.
        """
        feed = self.evaluation
        count = feed.num_bins if steps is None else steps * feed.batch_size
        if count >= feed.num_bins:
            return None
        if self.packed and len(feed.plans) == 1:
            return list(range(count))
        mixed = np.random.default_rng(0).permutation(feed.num_bins)
        return sorted(mixed[:count].tolist())


def prepare(
    dataset: Dataset, objective: type[Objective] | Objective, vocabulary: Any
) -> dict[str, list[data_lib.TokenizedCache]]:
    """Opens or makes the tokenised caches ``{"train": [...], "validation": [...]}``."""
    if dataset.synthetic:
        if dataset.eval_data or dataset.augment:
            raise ValueError(
                f"{dataset.data} makes its evaluation data itself, and its rows are "
                "new ones always: leave out EVAL_DATA and Dataset.augment."
            )
        if dataset.on_too_long != "truncate":
            raise ValueError(
                f"{dataset.data} makes rows without end, of which none can be left out "
                "beforehand: leave ON_TOO_LONG at 'truncate'."
            )
        return synthetic.caches(
            dataset.data,
            objective.schema,
            vocabulary,
            options=dataset.task_options,
            seed=dataset.seed,
            split_seed=dataset.split_seed,
        )
    from jaxalign import prepare as prepare_lib  # may need TensorFlow

    opened: dict[str, list[data_lib.TokenizedCache]] = {"train": [], "validation": []}
    held_out = dataset.eval_data is None and dataset.eval_split is None
    sources = dataset.sources()
    given = ("on_bad_row", "desirable_above", "task_options", "module", "max_rows")
    given = (*given, "beam_options", "chat_template")
    common = {name: getattr(dataset, name) for name in given} | {
        "schema": objective.schema,
        "vocabulary": vocabulary,
        "cache_dir": dataset.cache_folder,
        "field_map": dict(dataset.field_map) if dataset.field_map else None,
        "require": objective.requires,
        "columns": batches.extra(objective.columns, "rows"),
        "seed": dataset.split_seed,
    }
    for name in sources:
        own = {"eval_fraction": dataset.eval_fraction if held_out else 0.0, **common}
        if len(sources) > 1:  # files have fields to map, data sets have options
            is_file = glob.has_magic(name) or Path(name).expanduser().exists()
            is_file = is_file or remote.is_remote(name)
            own["task_options" if is_file else "field_map"] = None
        paths = prepare_lib.prepare(name, split=dataset.split, **own)
        # Other EVAL_DATA replaces a prepared folder's own validation split.
        for split in ("train", "validation") if held_out else ("train",):
            if split in paths:
                opened[split].append(data_lib.TokenizedCache(paths[split]))
    if not held_out:
        name = dataset.eval_data or next(iter(sources))
        split = dataset.eval_split or dataset.split
        paths = prepare_lib.prepare(name, split=split, eval_fraction=0.0, **common)
        held = data_lib.TokenizedCache(paths.get("validation", paths["train"]))
        opened["validation"].append(held)
        if held.path in [cache.path for cache in opened["train"]]:
            _log.warning(
                "EVAL_DATA is the data that is trained on, %s: its numbers say nothing "
                "of other prompts. Leave it out to hold EVAL_FRACTION of them out.",
                held.path,
            )
    return opened


def build(
    dataset: Dataset,
    objective: Objective,
    vocabulary: vocabularies.Vocabulary,
    reward_stats: tuple[float, float] | None = None,
) -> Inputs:
    """Prepares and checks the data, plans the packing and makes the feeds.

    Args:
      reward_stats: ``(mean, deviation)`` from the checkpoint of a run that goes on;
        None fits them on the training split.
    """
    caches = prepare(dataset, objective, vocabulary)
    for cache in [*caches["train"], *caches["validation"]]:
        _check_cache(cache, objective, vocabulary)
    plans = {
        split: [_plan(cache, dataset, objective) for cache in of_split if len(cache)]
        for split, of_split in caches.items()
    }
    _tell_equal(caches, plans)
    if not dataset.synthetic and (told := shared_prompts(caches)):
        _log.warning("%s", told)
    if "response_label" in objective.columns:
        _tell_one_sided_labels(caches["train"], objective)
    rates = list(dataset.sources().values())
    if not objective.uses_rewards:
        reward_stats = None
    elif reward_stats is None:
        reward_stats = _reward_stats(caches["train"], rates, plans["train"])

    def feed(split: str) -> data_lib.Feed:
        train = split == "train"
        weights = rates if train else [1.0] * len(plans[split])
        endless = dataset.synthetic and train
        return (synthetic.SyntheticFeed if endless else data_lib.Feed)(
            list(zip(caches[split], plans[split], weights, strict=True)),
            batch_size=dataset.batch_size,
            seed=dataset.seed,
            shuffle=dataset.shuffle and train,
            reward_stats=reward_stats,
            row_columns=batches.extra(objective.columns, "rows"),
            augment=dataset.augment and configs.bound(dataset.augment),
        )

    return Inputs(
        train=feed("train"),
        evaluation=feed("validation") if plans["validation"] else None,
        reward_stats=reward_stats,
        vocabulary=vocabulary,
        packed=bool(dataset.packing),
    )


def _plan(
    cache: data_lib.TokenizedCache, dataset: Dataset, objective: Objective
) -> data_lib.Plan:
    """Which rows of a cache are fed, and with which others."""
    lengths = dataset.feature_lengths
    cut = too_long.sides(dataset.truncate, cache)
    keep = too_long.keep(cache, **lengths, on_too_long=dataset.on_too_long)
    seen = None
    if keep is None:
        several = objective.min_prompts > 1
        seen = data_lib.seen(cache, **lengths, prompts=several, cut=cut)
    return data_lib.pack(
        cache.index,
        **lengths,
        packing=dataset.packing,
        decoder_rows=dataset.decoder_rows,
        min_prompts=objective.min_prompts,
        seen=seen,
        cut=cut,
        keep=keep,
    )


def _reward_stats(
    caches: Sequence[data_lib.TokenizedCache],
    rates: Sequence[float] = (1.0,),
    plans: Sequence[data_lib.Plan] = (),
) -> tuple[float, float]:
    """Mean and deviation of the rewards as training meets them, at mixing rates."""
    indices = [cache.index for cache in caches]
    for i, plan in enumerate(plans):
        if plan.left_out["rows"]:
            indices[i] = indices[i].take(np.sort(plan.row_ids))
    found = [np.asarray(index.response_reward, np.float64) for index in indices]
    found = [rewards[np.isfinite(rewards)] for rewards in found]
    rewards, weights = np.concatenate(found), None
    if len(caches) > 1:
        # How often a step meets each reward of a source.
        rows = [max(index.num_rows, 1) for index in indices]
        often = [rate / n for rate, n in zip(rates, rows, strict=True)]
        weights = np.repeat(often, [len(r) for r in found])
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.average(rewards, weights=weights)
        deviation = np.sqrt(np.average(np.square(rewards - mean), weights=weights))
    # Equal rewards differ by the rounding of whoever computed them.
    if deviation <= np.finfo(np.float32).eps * np.abs(rewards).max():
        raise ValueError(
            f"All {rewards.size} rewards equal {mean:g}: there is nothing to learn "
            "from. Check FIELD_MAP's 'reward'."
        )
    if not np.isfinite(deviation):
        raise ValueError(
            f"The {rewards.size} rewards reach {np.abs(rewards).max():g}, too far for "
            "a standard deviation. Check FIELD_MAP's 'reward'."
        )
    return float(mean), float(deviation)


def shared_prompts(caches: Mapping[str, Sequence[data_lib.TokenizedCache]]) -> str:
    """A sentence on validation prompts that are trained on; empty if there are none."""
    hashes = {
        split: [np.asarray(cache.index.prompt_hash) for cache in of_split]
        for split, of_split in caches.items()
    }
    if not (hashes["train"] and hashes["validation"]):
        return ""
    if {c.path for c in caches["train"]} & {c.path for c in caches["validation"]}:
        return ""  # told as a whole
    held = np.concatenate(hashes["validation"])
    count = int(np.isin(held, np.concatenate(hashes["train"])).sum())
    if not count:
        return ""
    return (
        f"{count:,} of {len(held):,} rows of the validation data have a prompt that is "
        "trained on: their numbers say little of other prompts. Leave such rows out of "
        "EVAL_DATA, or leave out EVAL_DATA, and EVAL_FRACTION of the prompts is held "
        "out."
    )


def _tell_equal(
    caches: Mapping[str, Sequence[data_lib.TokenizedCache]],
    plans: Mapping[str, Sequence[data_lib.Plan]],
) -> None:
    """Tells what is equal once it is cut; refuses pairs that all are."""
    for split, of_split in plans.items():
        if equal := sum(plan.equal["pairs"] for plan in of_split):
            pairs = sum(int(cache.index.num_pairs.sum()) for cache in caches[split])
            text = (
                f"{equal} of {pairs} pairs ({split}) are equal once their responses "
                f"are cut to {of_split[0].targets} tokens"
            )
            advice = "Raise TASK_FEATURE_LENGTHS['targets']."
            if equal == pairs and split == "train":
                raise ValueError(f"{text}: there is nothing to learn from. {advice}")
            _log.warning("%s and are left out. %s", text, advice)
        if equal := sum(plan.equal["prompts"] for plan in of_split):
            _log.warning(
                "%d of %d prompts (%s) equal another once they are cut to %d tokens: "
                "no response is mismatched with one of these that equals its own. "
                "Raise TASK_FEATURE_LENGTHS['inputs'].",
                equal,
                sum(cache.index.num_rows for cache in caches[split]),
                split,
                of_split[0].inputs,
            )


def _tell_one_sided_labels(
    caches: list[data_lib.TokenizedCache], objective: Objective
) -> None:
    """Warns where all thumbs point the same way."""
    labels = np.concatenate([c.index.response_label for c in caches])
    labels = labels[labels >= 0]
    if labels.size and (labels == labels[0]).all():
        _log.warning(
            "All %d labels of the training data are thumbs %s: %s has nothing to tell "
            "good responses from bad ones by. Add responses of the other kind, or "
            "check FIELD_MAP's 'label' and DESIRABLE_ABOVE.",
            labels.size,
            "up" if labels[0] == batches.DESIRABLE else "down",
            type(objective).__name__,
        )


def _check_cache(
    cache: data_lib.TokenizedCache, objective: Objective, vocabulary: Any
) -> None:
    """Refuses data that cannot serve the objective or the network."""
    size = objective.model.config.vocab_size
    if cache.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ValueError(
            f"{cache.path} was tokenised with {cache.vocabulary!r}, but VOCABULARY is "
            f"{vocabulary!r}: prepare the data again, or set VOCABULARY to match."
        )
    if vocabulary.vocab_size > size:
        raise ValueError(
            f"{vocabulary!r} has {vocabulary.vocab_size} ids, but the network has only "
            f"{size} rows in its embedding: set models.T5Config.vocab_size to at least "
            f"{vocabulary.vocab_size}."
        )
    index = cache.index
    answers = index.response_kind == batches.ANSWER
    for name, needed, absent in (
        ("label", "a thumbs-up or -down", index.response_label < 0),
        ("reward", "a scalar reward", ~np.isfinite(index.response_reward)),
    ):
        missing = int(np.sum(absent & answers))
        if missing and f"response_{name}" in objective.columns:
            raise ValueError(
                f"{type(objective).__name__} needs {needed} for every response, but "
                f"{missing} of {index.num_responses} in {cache.path} have no "
                f"{name!r}: add it, or map it with FIELD_MAP."
            )
