"""The response batch: one dict of static-shaped arrays for every method.

A name's prefix says which axis the array lives on:

==============  ===============  =====================================================
prefix          shape            arrays
==============  ===============  =====================================================
``encoder_*``   ``[B, Le]``      ``input_tokens``, ``segment_ids``
``decoder_*``   ``[B, K, Ld]``   ``input_tokens``, ``target_tokens``, ``loss_weights``,
                                 ``segment_ids``
``prompt_*``    ``[B, P]``       ``mask``, ``id``
``response_*``  ``[B, R]``       ``mask``, ``prompt``, ``kl_prompt``, ``kind``,
                                 ``reward``, ``label``, ``ref_logps``, ``ref_kl_logps``
``pair_*``      ``[B, Q]``       ``mask``, ``chosen``, ``rejected``, ``margin``
==============  ===============  =====================================================

`COLUMNS` is the whole list, and `add_column` adds to it.

An encoder row holds prompts as segments ``1..P``; beside it stand ``K`` decoder rows
holding responses as segments ``1..R``, numbered over all ``K`` rows. Segment 0 is
padding. ``response_prompt[b, r]`` is the index ``p`` of the prompt that response ``r``
answers: decoder tokens of segment ``r + 1`` attend to the encoder tokens of segment
``p + 1`` and to nothing else. Pairs index into ``R``.

T5's position bias depends on distances inside one segment only, so packing needs no
position arrays.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, Any]

# Values of ``response_kind``.
ANSWER = 0  # a response to the task's own prompt
RATIONALE = 1  # a text that explains a preference; never a member of a pair

# Values of ``response_label``; -1 stands for "no label".
UNDESIRABLE, DESIRABLE, NO_LABEL = 0, 1, -1


@dataclasses.dataclass(frozen=True)
class Column:
    """One array of a batch.

    Attributes:
      axes: ``B`` and what one value belongs to: a prompt (``BP``), a response
        (``BR``), a pair (``BQ``), a prompt's token (``BE``), a response's token
        (``BKD``). A trailing ``M``: each value is a vector.
      dtype: float32 or int32.
      empty: what an empty place holds.
      source: ``"batch"``, in every batch; ``"rows"``, read off the rows of the data
        where an objective asks for it, under its own name; ``"pass"``, computed from
        the rows and joined by the feed.
      optional: whether a row may lack it; ``empty`` stands for it then.
      size: of a vector of the data's rows.
    """

    axes: str
    dtype: type = np.float32
    empty: float = 0
    source: str = "rows"
    optional: bool = False
    size: int = 0

    @property
    def owner(self) -> str:
        """What one value belongs to: ``P``, ``R``, ``Q``, ``E`` or ``D``."""
        return self.axes.removesuffix("M")[-1]

    @property
    def vector(self) -> bool:
        return self.axes.endswith("M")

    @property
    def absent(self) -> Any:
        """What stands for the value of a row that lacks it."""
        return [self.empty] * self.size if self.vector else self.empty


# Every array a batch may hold is listed here and nowhere else.
COLUMNS: dict[str, Column] = {
    "encoder_input_tokens": Column("BE", np.int32, source="batch"),
    "encoder_segment_ids": Column("BE", np.int32, source="batch"),
    "decoder_input_tokens": Column("BKD", np.int32, source="batch"),
    "decoder_target_tokens": Column("BKD", np.int32, source="batch"),
    "decoder_loss_weights": Column("BKD", source="batch"),
    "decoder_segment_ids": Column("BKD", np.int32, source="batch"),
    "prompt_mask": Column("BP", source="batch"),
    "prompt_id": Column("BP", np.int32, -1, "batch"),
    "response_mask": Column("BR", source="batch"),
    "response_prompt": Column("BR", np.int32, source="batch"),
    # The mismatched prompt; -1: none.
    "response_kl_prompt": Column("BR", np.int32, -1, "batch"),
    "response_kind": Column("BR", np.int32, source="batch"),
    "response_reward": Column("BR", source="batch"),
    "response_label": Column("BR", np.int32, NO_LABEL, "batch"),
    "pair_mask": Column("BQ", source="batch"),
    "pair_chosen": Column("BQ", np.int32, source="batch"),
    "pair_rejected": Column("BQ", np.int32, source="batch"),
    "pair_margin": Column("BQ", source="batch"),
    "response_ref_logps": Column("BR", source="pass"),
    "response_ref_kl_logps": Column("BR", source="pass"),
}
_OWNERS = {
    "prompt": "BP",
    "response": "BR",
    "pair": "BQ",
    "encoder": "BE",
    "decoder": "BKD",
}


def axes_of(name: str) -> str:
    """The axes of a column's values, vectors apart, which its name's prefix says.

    Raises:
      ValueError: for a name that says none, with the nearest prefix.

    >>> axes_of("decoder_old_logps")
    'BKD'
    """
    prefix = name.partition("_")[0]
    if prefix not in _OWNERS:
        near = difflib.get_close_matches(prefix, _OWNERS, 1, 0)
        raise ValueError(
            f"Column {name!r}: the prefix of a name says what a value belongs to, one "
            f"of {[f'{known}_' for known in _OWNERS]}. Did you mean '{near[0]}_'?"
        )
    return _OWNERS[prefix]


def add_column(name: str, axes: str, dtype: type = np.float32, **settings: Any) -> None:
    """Adds an array that objectives may ask for by its name.

    Args:
      name: ``prompt_*``, ``response_*``, ``pair_*``, ``encoder_*`` or ``decoder_*``; a
        field of the data's rows is called the same, or mapped to it by ``FIELD_MAP``.
      axes, dtype, **settings: of `Column`.

    Raises:
      ValueError: when name and axes do not go together, or the name is taken by
        another column.

    >>> add_column("pair_weight", "BQ", optional=True, empty=1.0)
    >>> COLUMNS["pair_weight"].owner
    'Q'
    """
    column = Column(axes, dtype, **settings)
    if axes.removesuffix("M") != axes_of(name):
        raise ValueError(
            f"The column {name!r} has the axes {axes!r}; names and axes go together: "
            + ", ".join(f"{prefix}_* {v} or {v}M" for prefix, v in _OWNERS.items())
        )
    if COLUMNS.setdefault(name, column) != column:
        raise ValueError(f"There is another column {name!r}: {COLUMNS[name]}.")


def extra(columns: Iterable[str], source: str) -> tuple[str, ...]:
    """Those of an objective's ``columns`` that come from a `Column.source`.

    Raises:
      ValueError: for a column that there is not, with the nearest there is.
    """
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"Unknown column {name!r}{hint} `jaxalign.batch.add_column` adds one."
            )
    return tuple(name for name in columns if COLUMNS[name].source == source)


def example() -> dict[str, np.ndarray]:
    """The smallest batch, all ones; shapes of parameters do not depend on it."""
    return {
        name: np.ones((1,) * len(column.axes), column.dtype)
        for name, column in COLUMNS.items()
    }


def sizes(batch: Batch) -> dict[str, int]:
    """The axis sizes ``{"B", "E", "K", "D", "P", "R", "Q"}`` of a batch."""
    found: dict[str, int] = {}
    for name, value in batch.items():
        if name in COLUMNS and not COLUMNS[name].vector:
            found.update(zip(COLUMNS[name].axes, value.shape, strict=True))
    return found


def check(batch: Batch, required: tuple[str, ...] = ()) -> None:
    """Checks names, axes and dtypes of a batch.

    Args:
      batch: arrays or ``jax.ShapeDtypeStruct``s by name.
      required: names that must be present.

    Raises:
      ValueError: naming the array, what was expected and what came.
    """
    missing = [name for name in required if name not in batch]
    if missing:
        raise ValueError(
            f"The batch lacks {missing}; it has {sorted(batch)}. Columns such as "
            "response_ref_logps come from the reference pass."
        )
    axes: dict[str, tuple[int, str]] = {}
    for name, value in batch.items():
        if name not in COLUMNS:
            raise ValueError(f"Unknown batch array {name!r}; known: {sorted(COLUMNS)}.")
        letters, dtype = COLUMNS[name].axes, COLUMNS[name].dtype
        if value.ndim != len(letters):
            raise ValueError(
                f"{name} must have axes {'x'.join(letters)}, got shape {value.shape}."
            )
        if np.dtype(value.dtype) != np.dtype(dtype):
            raise ValueError(
                f"{name} must be {np.dtype(dtype).name}, got {value.dtype}."
            )
        for letter, size in zip(letters, value.shape, strict=True):
            if letter == "M":  # each column's own
                continue
            known, source = axes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(
                    f"{name} has {letter}={size}, but {source} has {letter}={known}."
                )


def denominators(batch: Batch) -> dict[str, jax.Array]:
    """The counts a loss may be divided by, over the whole batch.

    Returns:
      Float32 scalars, 0 where there is nothing to count: ``tokens`` (loss-weighted
      target tokens), ``responses``, ``rationales`` (responses of that kind),
      ``prompts``, ``pairs`` and ``chosen_tokens`` (target tokens of each pair's chosen
      response).
    """
    chosen, _ = select_pairs(response_lengths(batch), batch)
    mask = batch["response_mask"]
    counts = {
        "tokens": jnp.sum(batch["decoder_loss_weights"]),
        "responses": jnp.sum(mask),
        "rationales": jnp.sum(mask * (batch["response_kind"] == RATIONALE)),
        "prompts": jnp.sum(batch["prompt_mask"]),
        "pairs": jnp.sum(batch["pair_mask"]),
        "chosen_tokens": jnp.sum(chosen * batch["pair_mask"]),
    }
    return {k: v.astype(jnp.float32) for k, v in counts.items()}


def prompt_of_tokens(
    decoder_segment_ids: jax.Array, response_prompt: jax.Array
) -> jax.Array:
    """The encoder segment each decoder token may attend to.

    Args:
      decoder_segment_ids: ``[B, K, Ld]``, response ``r`` as ``r + 1``, padding 0.
      response_prompt: ``[B, R]`` prompt indices; negative: none.

    Returns:
      ``[B, K, Ld]`` encoder segment ids, 0 where the token attends to nothing.
    """
    return by_token(jnp.maximum(response_prompt + 1, 0), decoder_segment_ids)


def by_token(values: jax.Array, decoder_segment_ids: jax.Array) -> jax.Array:
    """Gives each response's number to its tokens: ``[B, R]`` to ``[B, K, Ld]``.

    >>> by_token(jnp.array([[3.0, 5.0]]), jnp.array([[[1, 1, 2, 0]]]))
    Array([[[3., 3., 5., 0.]]], dtype=float32)
    """
    chex.assert_rank([decoder_segment_ids, values], [3, 2])
    # Index 0 answers for padding, so that segment ids index the table directly.
    table = jnp.pad(values, ((0, 0), (1, 0)))
    flat = decoder_segment_ids.reshape(decoder_segment_ids.shape[0], -1)
    return jnp.take_along_axis(table, flat, axis=1).reshape(decoder_segment_ids.shape)


def sum_by_response(
    values: jax.Array, decoder_segment_ids: jax.Array, num_responses: int
) -> jax.Array:
    """Sums per-token values over each response's tokens, in float32.

    Args:
      values: ``[B, K, Ld]``.
      decoder_segment_ids: ``[B, K, Ld]``.
      num_responses: ``R``.

    Returns:
      ``[B, R]`` sums; padding belongs to no response.

    >>> sum_by_response(jnp.ones((1, 1, 4)), jnp.array([[[1, 1, 2, 0]]]), 2)
    Array([[2., 1.]], dtype=float32)
    """
    chex.assert_equal_shape([values, decoder_segment_ids])
    member = decoder_segment_ids[..., None] == jnp.arange(1, num_responses + 1)
    # A masked sum rather than a matrix product: exact in float32 on every backend.
    return jnp.sum(
        jnp.where(member, values.astype(jnp.float32)[..., None], 0.0), axis=(1, 2)
    )


def response_lengths(batch: Batch) -> jax.Array:
    """``[B, R]`` target tokens per response, EOS included."""
    return sum_by_response(
        batch["decoder_loss_weights"],
        batch["decoder_segment_ids"],
        batch["response_mask"].shape[1],
    )


def select_pairs(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Picks from ``[B, R]`` values: ``(chosen, rejected)`` of each pair, ``[B, Q]``."""
    take = jnp.take_along_axis
    return (
        take(values, batch["pair_chosen"], axis=1),
        take(values, batch["pair_rejected"], axis=1),
    )
