"""seqio on both sides: its tasks as our rows, our data sets as its tasks.

Everything here imports seqio (and so TensorFlow) when called, never when imported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from jaxalign import batch
from jaxalign.data import records as records_lib
from jaxalign.data.bad_rows import BadRow, BadRows, DataError, FieldError, nearest, show
from jaxalign.data.rows import Row
from jaxalign.prepare import late_imports, rationales, sources
from jaxalign.prepare import tasks as tasks_lib
from jaxalign.prepare.rows import Encoded, by_prompt, row_key
from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary, Vocabulary

# The token features a seqio task needs to serve a schema.
_PAIR = ("inputs", "chosen", "rejected")
_TOKENS = {
    "supervised": ("inputs", "targets"),
    "trajectory": ("inputs", "targets"),
    "preference": _PAIR,
    "rationale": (*_PAIR, "rationale_inputs", "rationale_targets"),
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

    It has to have the ids of ``vocabulary``, with which the model is configured.
    """
    seqio = late_imports.seqio()

    if name in _REGISTERED and vocabulary in (None, _REGISTERED[name]):
        return _REGISTERED[name]  # escapes included, which seqio knows nothing of
    features = seqio.get_mixture_or_task(name).output_features
    found = {f: _ours(features[f].vocabulary, name) for f in _TEXT_OF if f in features}
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
    same = vocabulary in (None, theirs)
    if isinstance(theirs, SentencePieceVocabulary) and not same:  # escapes apart
        ours = [getattr(vocabulary, n, None) for n in ("model_bytes", "extra_ids")]
        same = ours == [theirs.model_bytes, theirs.extra_ids]
    if not same:
        raise ValueError(
            f"The seqio task {name!r} tokenises with {theirs!r}, and {vocabulary!r} "
            "is asked for: set VOCABULARY to the former."
        )
    return theirs


def _ours(vocabulary: Any, name: str) -> Vocabulary:
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


def token_rows(name: str, schema: str, split: str) -> Iterator[Encoded | BadRow]:
    """The rows of a seqio task or mixture, its token ids taken as they are.

    ``trajectory`` also reads ``reward`` or ``label``, and ``preference`` and
    ``rationale`` a ``margin`` where there is one. Nothing is cut.
    """
    provider = late_imports.seqio().get_mixture_or_task(name)
    features = provider.output_features
    lacking = [f for f in _TOKENS[schema] if f not in features]
    if schema == "trajectory" and not {"reward", "label"} & set(features):
        lacking.append("reward or label")
    if lacking:
        raise ValueError(
            f"The seqio task {name!r} has the features {sorted(features)}, but the "
            f"schema {schema!r} also needs {lacking}."
        )
    if split not in provider.splits:
        raise ValueError(
            f"{name!r} has the splits {sorted(provider.splits)}, not {split!r}"
            f"{nearest(split, provider.splits)}."
        )
    dataset = provider.get_dataset(
        sequence_length=None, split=split, shuffle=False, num_epochs=1, seed=0
    )
    for line, example in enumerate(dataset.as_numpy_iterator(), start=1):
        try:
            yield Encoded([_token_row(example, schema, f"{name}:{line}")], 0)
        except FieldError as error:
            yield error.at(name, line)


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
        record = {"prompt": "-", "completion": "-"} | numbers
        (checked,) = records_lib.convert(record, schema)
        reward = checked.get("reward", reward)
        label = checked.get("label", label)
    if schema in ("preference", "rationale"):
        if np.array_equal(*responses[:2]):
            expected = "another text than chosen"
            raise FieldError("rejected", "identical", expected, "the same tokens")
        pairs = [(0, 1, _number(example.get("margin", 0.0)))]
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
        got = f"{ids.dtype} of shape {ids.shape}"
        raise FieldError(field, "type", "a vector of token ids", got)
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
    transform = tasks_lib.get_task(task).transform(schema)
    numbers = {"supervised": {}, "trajectory": _TRAJECTORY}.get(schema, _MARGIN)
    words = {_TEXT_OF[feature]: feature for feature in _TOKENS[schema]}

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        del shuffle_files, seed  # rows come in the order of their source
        tf = late_imports.tensorflow()

        source = sources.find_source(data or task, split, task if data else None)
        signature = {f: tf.TensorSpec((), tf.string) for f in _TOKENS[schema]}
        signature |= {f: tf.TensorSpec((), dtype) for f, (dtype, _) in numbers.items()}

        def generate() -> Iterator[dict[str, Any]]:
            rows = source.rows()
            names = source.identity.get("names", ())
            for item in records_lib.examples(rows, schema, transform=transform):
                if isinstance(item, BadRow):
                    bad = BadRows()
                    bad.add(item)
                    raise DataError(bad)
                orders = _orders(item, names) if schema == "rationale" else {}
                for i, record in enumerate(item.records):
                    if schema == "rationale":
                        why = rationales.rationale_text(record["rationale"], orders[i])
                        asked = rationales.rationale_prompt(record, orders[i])
                        record = {**record, "rationale_prompt": asked, "rationale": why}
                    row = {f: escape(record[w]) for w, f in words.items()}
                    for feature, (_, default) in numbers.items():
                        row[feature] = record.get(feature, default)
                    yield row

        return tf.data.Dataset.from_generator(generate, output_signature=signature)

    if isinstance(vocabulary, ByteVocabulary):
        theirs, escape = seqio.ByteVocabulary(vocabulary.extra_ids), str
    elif (vocabulary.pad_id, vocabulary.eos_id) != (0, 1) or not hasattr(
        vocabulary, "model_bytes"
    ):
        raise ValueError(
            f"seqio has no vocabulary with the ids of {vocabulary!r}; read files of "
            "rows (DATA='file.jsonl') in place of a seqio task."
        )
    else:
        escape = vocabulary.escape_text
        theirs = seqio.SentencePieceVocabulary(vocabulary.path, vocabulary.extra_ids)
    text = seqio.Feature(theirs, add_eos=True)
    features = dict.fromkeys(_TOKENS[schema], text)
    for feature, (dtype, _) in numbers.items():
        features[feature] = seqio.Feature(
            seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=dtype, rank=0
        )
    splits = ("train", "validation", "test")
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=splits),
        preprocessors=[
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.preprocessors.append_eos,
        ],
        output_features=features,
        metric_fns=[],
    )
    _REGISTERED[name] = vocabulary
    return name


def _orders(example: records_lib.Example, names: Collection[str]) -> dict[int, bool]:
    """Whether each record shows its chosen answer second, as rows of a cache do."""
    key = row_key(example.file, example.line, names)
    numbered = [{**r, "number": i} for i, r in enumerate(example.records)]
    return {
        record["number"]: rationales.chosen_comes_second(own, i, 0)
        for own, group in by_prompt(numbered, key).values()
        for i, record in enumerate(group)
    }
