"""seqio on both sides: its tasks as our rows, our data sets as its tasks.

Everything here imports seqio (and so TensorFlow) when called, never when imported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxalign import batch
from jaxalign.data import records as records_lib
from jaxalign.data.bad_rows import BadRow, BadRows, DataError, FieldError, nearest, show
from jaxalign.data.rows import Row
from jaxalign.prepare import late_imports, rationales, sources
from jaxalign.prepare import tasks as tasks_lib
from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary, Vocabulary

# The token features a seqio task needs to serve a schema.
_TOKENS = {
    "supervised": ("inputs", "targets"),
    "trajectory": ("inputs", "targets"),
    "preference": ("inputs", "chosen", "rejected"),
    "rationale": (
        "inputs",
        "chosen",
        "rejected",
        "rationale_inputs",
        "rationale_targets",
    ),
}
_TEXT_OF = {
    "inputs": "prompt",
    "targets": "completion",
    "chosen": "chosen",
    "rejected": "rejected",
    "rationale_inputs": "rationale_prompt",
    "rationale_targets": "rationale",
}
# Number features: their type, and what stands for "none".
_TRAJECTORY = {"reward": ("float32", math.nan), "label": ("int32", batch.NO_LABEL)}
# The vocabularies of tasks that :func:`register` made.
_REGISTERED: dict[str, Vocabulary] = {}
_MARGIN = {"margin": ("float32", 0.0)}


def vocabulary_of(name: str, vocabulary: Vocabulary | None = None) -> Vocabulary:
    """The vocabulary of a seqio task's features, as one of ours.

    Args:
      name: a registered task or mixture.
      vocabulary: what the model is configured with, to be compared.

    Raises:
      ValueError: when features differ in vocabulary, or it is of another kind than
        bytes and SentencePiece, or its ids are not those of ``vocabulary``.
    """
    seqio = late_imports.seqio()

    if name in _REGISTERED and vocabulary in (None, _REGISTERED[name]):
        return _REGISTERED[name]  # escapes included, which seqio knows nothing of
    features = seqio.get_mixture_or_task(name).output_features
    found: dict[str, Vocabulary] = {}
    for feature in _TEXT_OF:
        if feature in features:
            found[feature] = from_seqio(features[feature].vocabulary, name)
    if not found:
        raise ValueError(
            f"The seqio task {name!r} has the features {sorted(features)}; expected "
            "'inputs' and 'targets', or 'inputs', 'chosen' and 'rejected'."
        )
    theirs = next(iter(found.values()))
    if any(other != theirs for other in found.values()):
        raise ValueError(
            f"The features of {name!r} have different vocabularies: {found}; one for "
            "all is needed."
        )
    if vocabulary is not None and not _same_ids(vocabulary, theirs):
        raise ValueError(
            f"The seqio task {name!r} tokenises with {theirs!r}, and {vocabulary!r} "
            "is asked for: set VOCABULARY to the former."
        )
    return theirs


def from_seqio(vocabulary: Any, name: str = "the task") -> Vocabulary:
    """Our vocabulary with the ids of a seqio one."""
    seqio = late_imports.seqio()

    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(extra_ids=vocabulary.extra_ids)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        # The task tokenises without escapes, so decoding must not undo any.
        return SentencePieceVocabulary(
            vocabulary.sentencepiece_model_file, vocabulary.extra_ids, escape=False
        )
    raise ValueError(
        f"{name} has a {type(vocabulary).__name__}; expected seqio.ByteVocabulary or "
        "seqio.SentencePieceVocabulary."
    )


def to_seqio(vocabulary: Vocabulary) -> Any:
    """The seqio vocabulary with the ids of ours (escapes apart)."""
    seqio = late_imports.seqio()

    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary(vocabulary.extra_ids)
    if (vocabulary.pad_id, vocabulary.eos_id) != (0, 1) or not hasattr(
        vocabulary, "model_bytes"
    ):
        raise ValueError(
            f"seqio has no vocabulary with the ids of {vocabulary!r}; read files of "
            "rows (DATA='file.jsonl') in place of a seqio task."
        )
    return seqio.SentencePieceVocabulary(vocabulary.path, vocabulary.extra_ids)


def _same_ids(a: Vocabulary, b: Vocabulary) -> bool:
    if isinstance(a, SentencePieceVocabulary) and isinstance(
        b, SentencePieceVocabulary
    ):
        return (a.model_bytes, a.extra_ids) == (b.model_bytes, b.extra_ids)
    return a == b


def token_rows(
    name: str,
    schema: str,
    *,
    split: str = "train",
    sequence_length: Mapping[str, int] | None = None,
) -> Iterator[list[Row] | BadRow]:
    """The rows of a seqio task or mixture, its token ids taken as they are.

    Args:
      schema: ``supervised`` reads the features ``inputs`` and ``targets``,
        ``trajectory`` also ``reward`` or ``label``, ``preference`` reads ``inputs``,
        ``chosen``, ``rejected`` and, where present, ``margin``, ``rationale`` also
        ``rationale_inputs`` and ``rationale_targets``.
      sequence_length: handed to the task; nothing is cut where it is None.

    Raises:
      ValueError: when the task lacks the features of the schema.
    """
    seqio = late_imports.seqio()

    provider = seqio.get_mixture_or_task(name)
    _check_features(name, schema, provider.output_features)
    if split not in provider.splits:
        raise ValueError(
            f"{name!r} has the splits {sorted(provider.splits)}, not {split!r}"
            f"{nearest(split, provider.splits)}."
        )
    dataset = provider.get_dataset(
        sequence_length=sequence_length,
        split=split,
        shuffle=False,
        num_epochs=1,
        seed=0,
    )
    for line, example in enumerate(dataset.as_numpy_iterator(), start=1):
        try:
            yield [_token_row(example, schema, f"{name}:{line}")]
        except FieldError as error:
            yield error.at(name, line)


def _check_features(name: str, schema: str, features: Mapping[str, Any]) -> None:
    if schema not in _TOKENS:
        raise ValueError(
            f"A seqio task cannot serve the schema {schema!r} (expected one of "
            f"{list(_TOKENS)}): use a JSON Lines file or a task of jaxalign.tasks."
        )
    lacking = [f for f in _TOKENS[schema] if f not in features]
    if schema == "trajectory" and not {"reward", "label"} & set(features):
        lacking.append("reward or label")
    if lacking:
        raise ValueError(
            f"The seqio task {name!r} has the features {sorted(features)}, but the "
            f"schema {schema!r} also needs {lacking}."
        )


def _token_row(example: Mapping[str, Any], schema: str, key: str) -> Row:
    tokens = {f: _with_eos(example[f], f) for f in _TOKENS[schema]}
    prompts = [f for f in tokens if f.endswith("inputs")]
    responses = [ids for f, ids in tokens.items() if f not in prompts]
    reward, label, pairs = math.nan, batch.NO_LABEL, []
    if schema == "trajectory":
        numbers = {f: _number(example[f]) for f in ("reward", "label") if f in example}
        # What our own tasks write for "none", in whichever of the two there is not.
        if numbers.get("label") == batch.NO_LABEL:
            del numbers["label"]
        if "label" in numbers and math.isnan(numbers.get("reward", 0.0)):
            del numbers["reward"]
        # The same checks as for a text file.
        checked = records_lib.convert(
            {"prompt": "-", "completion": "-"} | numbers, schema
        )[0]
        reward = checked.get("reward", reward)
        label = checked.get("label", label)
    if schema in ("preference", "rationale"):
        if np.array_equal(*responses[:2]):
            raise FieldError(
                "rejected", "identical", "another text than chosen", "the same tokens"
            )
        margin = _number(example["margin"]) if "margin" in example else 0.0
        pairs = [(0, 1, margin)]
    count = len(responses)
    kinds, of_prompt = [batch.ANSWER] * count, [0] * count
    if schema == "rationale":
        kinds[-1], of_prompt[-1] = batch.RATIONALE, 1
    return Row(
        key=key,
        prompts=[tokens[f] for f in prompts],
        responses=responses,
        response_prompt=of_prompt,
        response_kind=kinds,
        response_reward=[reward] * count,
        response_label=[label] * count,
        pairs=pairs,
    )


def _with_eos(ids: Any, field: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise FieldError(
            field, "type", "a vector of token ids", f"{ids.dtype} of shape {ids.shape}"
        )
    ids = ids[ids != 0]
    if not len(ids) or ids.tolist() == [1]:
        raise FieldError(field, "empty", "a text that is not empty", "no tokens")
    if ids[-1] != 1:
        ids = np.append(ids, 1)
    return ids.astype(np.int32)


def _number(value: Any) -> Any:
    value = np.asarray(value)
    if value.size != 1:
        raise FieldError("reward", "type", "one number", show(value.tolist()))
    return value.reshape(()).item()


def register(
    task: str,
    schema: str,
    vocabulary: Vocabulary,
    *,
    data: str | None = None,
    name: str | None = None,
) -> str:
    """Registers a data set of ``jaxalign.tasks`` as a seqio task.

    Its features are ``inputs`` and ``targets`` (with ``reward`` and ``label`` for
    trajectories), or ``inputs``, ``chosen``, ``rejected`` and ``margin``; for
    rationales ``rationale_inputs`` and ``rationale_targets`` besides, a prompt that
    shows both answers in a random order and its answer. Every record is an example of
    its own, as seqio has it.

    Args:
      schema: ``supervised``, ``trajectory``, ``preference`` or ``rationale``.
      data: an exported file of the data set, instead of its own source.
    """
    seqio = late_imports.seqio()

    name = name or f"{task}_{schema}"
    if schema not in _TOKENS:
        raise ValueError(
            f"No seqio features are defined for the schema {schema!r}; expected one "
            f"of {list(_TOKENS)}."
        )
    transform = tasks_lib.get_task(task).transform(schema)
    numbers = {"supervised": {}, "trajectory": _TRAJECTORY}.get(schema, _MARGIN)
    words = {_TEXT_OF[feature]: feature for feature in _TOKENS[schema]}

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        del shuffle_files, seed  # rows come in the order of their source
        tf = late_imports.tensorflow()

        source = (
            sources.find_source(data, task=task)
            if data
            else sources.find_source(task, split=split)
        )
        signature = {f: tf.TensorSpec((), tf.string) for f in _TOKENS[schema]}
        signature |= {f: tf.TensorSpec((), dtype) for f, (dtype, _) in numbers.items()}

        def generate() -> Iterator[dict[str, Any]]:
            bad = BadRows()
            for item in records_lib.examples(
                source.rows(), schema, transform=transform
            ):
                if isinstance(item, BadRow):
                    bad.add(item)
                    raise DataError(bad)
                for i, record in enumerate(item.records):
                    if schema == "rationale":
                        record = _with_rationale_prompt(
                            record, f"{item.file}:{item.line}", i
                        )
                    row = {f: _escaped(record[w], vocabulary) for w, f in words.items()}
                    for feature, (_, default) in numbers.items():
                        row[feature] = record.get(feature, default)
                    yield row

        return tf.data.Dataset.from_generator(generate, output_signature=signature)

    text = seqio.Feature(to_seqio(vocabulary), add_eos=True)
    features = dict.fromkeys(_TOKENS[schema], text)
    for feature, (dtype, _) in numbers.items():
        features[feature] = seqio.Feature(
            seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=dtype, rank=0
        )
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            dataset_fn, splits=("train", "validation", "test")
        ),
        preprocessors=[
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.preprocessors.append_eos,
        ],
        output_features=features,
        metric_fns=[],
    )
    _REGISTERED[name] = vocabulary
    return name


def _with_rationale_prompt(
    record: records_lib.Record, key: str, index: int
) -> records_lib.Record:
    swap = rationales.chosen_comes_second(key, index, 0)
    return {
        **record,
        "rationale_prompt": rationales.rationale_prompt(record, swap),
        "rationale": rationales.rationale_text(record["rationale"], swap),
    }


def _escaped(text: str, vocabulary: Vocabulary) -> str:
    if isinstance(vocabulary, SentencePieceVocabulary) and vocabulary.escape:
        return vocabulary.escape_text(text)
    return text
