"""seqio's features as the columns of a response batch, for T5X's own input pipeline."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxalign.batch import COLUMNS

# The features with tokens of each schema: the prompt's, then the responses'.
_RESPONSES = {
    "supervised": ("targets",),
    "trajectory": ("targets",),
    "preference": ("chosen", "rejected"),
}
# Numbers of a task's examples, and the column that each fills; "?": may be absent.
_NUMBERS = {
    "response_reward": ("reward",),
    "response_label": ("label",),
    "pair_margin": ("margin?",),
}
_LOGPS = {"targets": "ref_logps", "chosen": "ref_chosen_logps"}
_LOGPS["rejected"] = "ref_rejected_logps"


def converter(objective: Any, *, cached_reference: bool = False) -> type:
    """The ``seqio.FeatureConverter`` of an objective: one prompt a row, unpacked.

    Its task features are those of docs/seqio.md: ``inputs`` and ``targets``, or
    ``inputs``, ``chosen`` and ``rejected``, and the numbers that the objective asks
    for. Lengths are given by these names, or as ``inputs`` and ``targets``.

    Args:
      objective: of ``jaxalign.objectives``.
      cached_reference: read the reference's log-probabilities from the task, as
        ``ref_logps``, or ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Raises:
      ValueError: for an objective on rows that one seqio example does not make.
    """
    if objective.schema not in _RESPONSES or objective.min_prompts > 1:
        raise ValueError(
            f"{type(objective).__name__} trains on rows that hold several prompts, and "
            "a seqio example is one: feed it through jaxalign train, or give T5X's "
            "train() a get_dataset_fn that yields response batches."
        )
    numbers = {
        column: names
        for column, names in _NUMBERS.items()
        if column in objective.columns or column == "pair_margin"
    }
    responses = _RESPONSES[objective.schema]
    if cached_reference:
        numbers["response_ref_logps"] = tuple(_LOGPS[name] for name in responses)
    if len(responses) == 1:
        numbers.pop("pair_margin")
    return _converter(responses, tuple(numbers.items()))


@functools.cache
def _converter(responses: tuple[str, ...], numbers: tuple[Any, ...]) -> type:
    import seqio
    import tensorflow as tf

    spec = seqio.FeatureConverter.FeatureSpec
    features = ("inputs", *responses)
    columns = [name for name, column in COLUMNS.items() if column.source == "batch"]
    columns += [name for name, _ in numbers if name not in columns]
    count = len(responses)

    class ResponseBatchConverter(seqio.FeatureConverter):
        """Rows of one prompt and its responses."""

        TASK_FEATURES = {name: spec(dtype=tf.int32) for name in features}
        MODEL_FEATURES = {
            name: spec(
                dtype=tf.as_dtype(COLUMNS[name].dtype),
                rank=len(COLUMNS[name].axes) - 1,
                sequence_dim=len(COLUMNS[name].axes) - 2,
            )
            for name in columns
        }
        PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}

        def __init__(self, pack: bool = False, **settings: Any):
            if pack:
                raise ValueError(
                    "jaxalign's rows in T5X are not packed: set "
                    "train/utils.DatasetConfig.pack = False, and train_eval/ too."
                )
            super().__init__(pack=False, **settings)

        def __call__(self, ds: Any, task_feature_lengths: Mapping[str, int]) -> Any:
            lengths = dict(task_feature_lengths)
            if set(lengths) == {"inputs", "targets"} and count > 1:
                most = lengths.pop("targets")
                lengths |= dict.fromkeys(responses, most)
                ds = ds.map(
                    lambda row: {
                        name: value[:most] if name in responses else value
                        for name, value in row.items()
                    }
                )
            for column, names in numbers:
                for name in names:
                    _check_number(ds.element_spec, name, column)
            return super().__call__(ds, lengths)

        def _convert_features(self, ds: Any, lengths: Mapping[str, int]) -> Any:
            longest = max(lengths[name] for name in responses)

            def padded(tokens: Any, length: int) -> Any:
                tokens = tokens[:length]
                return tf.pad(tokens, [[0, length - tf.shape(tokens)[0]]])

            def row(example: Mapping[str, Any]) -> dict[str, Any]:
                found = _empty(tf, columns, count)
                prompt = padded(example["inputs"], lengths["inputs"])
                targets = tf.stack([padded(example[n], longest) for n in responses])
                targets.set_shape([count, longest])
                prompt.set_shape([lengths["inputs"]])
                present = tf.cast(targets != 0, tf.int32)
                shifted = tf.pad(targets[:, :-1], [[0, 0], [1, 0]])
                found |= {
                    "encoder_input_tokens": prompt,
                    "encoder_segment_ids": tf.cast(prompt != 0, tf.int32),
                    "decoder_input_tokens": shifted * present,
                    "decoder_target_tokens": targets,
                    "decoder_loss_weights": tf.cast(present, tf.float32),
                    "decoder_segment_ids": present * tf.range(1, count + 1)[:, None],
                    "response_mask": tf.ones([count]),
                }
                if count > 1:  # as jaxalign's feed: equal once cut, equal to the loss
                    differ = tf.reduce_any(targets[0] != targets[1])
                    found["pair_mask"] = tf.cast(differ, tf.float32)[None]
                    found["pair_rejected"] = tf.ones([1], tf.int32)
                for column, names in numbers:
                    kind = tf.as_dtype(COLUMNS[column].dtype)
                    given = [n.rstrip("?") for n in names if n.rstrip("?") in example]
                    if given:
                        values = [tf.reshape(example[n], ()) for n in given]
                        found[column] = tf.cast(tf.stack(values), kind)
                return found

            return ds.map(row, num_parallel_calls=tf.data.AUTOTUNE)

        def get_model_feature_lengths(
            self, task_feature_lengths: Mapping[str, int]
        ) -> Mapping[str, int]:
            longest = max(task_feature_lengths[name] for name in responses)
            sizes = {"E": task_feature_lengths["inputs"], "D": longest}
            sizes |= {"P": 1, "Q": 1, "R": count}
            return {name: sizes[COLUMNS[name].axes[-1]] for name in columns}

    return ResponseBatchConverter


def _empty(tf: Any, columns: list[str], count: int) -> dict[str, Any]:
    """One row's numbers, as if nothing was known of its prompt and responses."""
    sizes = {"P": 1, "Q": 1, "R": count}
    found = {
        name: tf.fill(
            [sizes[COLUMNS[name].axes[-1]]],
            tf.constant(COLUMNS[name].empty, tf.as_dtype(COLUMNS[name].dtype)),
        )
        for name in columns
        if COLUMNS[name].axes[-1] in sizes
    }
    return {**found, "prompt_mask": tf.ones([1])}


def _check_number(spec: Mapping[str, Any], name: str, column: str) -> None:
    """Refuses a task without a number that the objective needs."""
    if name.endswith("?") or name in spec:
        return
    raise ValueError(
        f"The task lacks the feature {name!r} that fills {column}; it has "
        f"{sorted(spec)}. Declare it with seqio.PassThroughVocabulary(size=0) and "
        f"rank=0, as docs/seqio.md shows."
    )
