"""What happened to the rows: kept, rejected, lengths, unknown tokens, truncation."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign.data import cuts, plan, too_long
from jaxalign.data.bad_rows import quoted
from jaxalign.data.cache import TokenizedCache
from jaxalign.data.conversations import CHAT, DIALOGUE, IMPLICIT
from jaxalign.data.rows import Index, Row
from jaxalign.vocabularies import UNK_ID

_SHOWN_PROBLEMS = 20
# In the table, of how rows were read (`data.conversations`).
_READ_AS = {
    CHAT: "chat messages",
    DIALOGUE: "dialogues",
    IMPLICIT: "prompt from chosen",
}


def unknown_tokens(row: Row) -> dict[str, int]:
    """How many ids of a row's prompts and responses are unknown."""
    return {
        name: int(sum(np.count_nonzero(ids == UNK_ID) for ids in getattr(row, name)))
        for name in ("prompts", "responses")
    }


def summarise(
    index: Index, unknown: Mapping[str, int], source: dict[str, Any]
) -> dict[str, Any]:
    """The JSON-ready summary that is stored with the cache.

    ``unknown`` is the sum of :func:`unknown_tokens` over its rows; ``source`` counts
    the rows read, for all splits.
    """
    tokens = {"prompts": index.prompt_lengths, "responses": index.response_lengths}
    return {
        "source": source,
        "rows": index.num_rows,
        "responses": index.num_responses,
        "pairs": int(index.num_pairs.sum()),
        "prompt_tokens": mostsummary(index.prompt_lengths),
        "response_tokens": mostsummary(index.response_lengths),
        "unknown_token_rate": {
            name: unknown[name] / max(int(lengths.sum()), 1)
            for name, lengths in tokens.items()
        },
    }


def mostsummary(lengths: np.ndarray) -> dict[str, int]:
    """Percentiles, maximum and total of token counts, EOS included."""
    found = {
        f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 99)
    }
    return found | {"max": int(lengths.max()), "total": int(lengths.sum())}


def describe(
    cache: TokenizedCache,
    *,
    inputs: int | None = None,
    targets: int | None = None,
    packing: int | None = None,
    decoder_rows: int | None = None,
    truncate: too_long.Truncate = None,
    on_too_long: str = "truncate",
) -> str:
    """The summary of a cache as a table.

    Args:
      inputs: the length prompts are cut to (TASK_FEATURE_LENGTHS); with ``targets``
        the table also says what is truncated and how full packed rows are.
      truncate: on which side (`data.too_long.sides`).
      on_too_long: what becomes of rows that are longer: ``truncate``, ``skip``, or
        ``error``, a ValueError that lists them.
    """
    source = cache.summary.get("source", {})
    lines = [
        ("cache", str(cache.path)),
        ("schema", cache.schema),
        ("fingerprint", cache.fingerprint[:16]),
    ]
    if source:
        detail = f"{source['rows_kept']:,} kept, {source['rows_rejected']:,} rejected"
        if source["rows_left_out"]:
            detail += f", {source['rows_left_out']:,} left out by the task"
        lines.append(("rows read", f"{source['rows_read']:,}: {detail}"))
        if source["responses_left_out"]:
            count = f"{source['responses_left_out']:,} of rows kept"
            lines.append(("  responses left out", count))
        for name, count in sorted(source.get("read_as", {}).items()):
            lines.append((f"  {_READ_AS.get(name, name)}", f"{count:,} rows"))
        problems = sorted(source["rejected_by_problem"].items(), key=lambda p: -p[1])
        for problem, count in problems[:_SHOWN_PROBLEMS]:
            lines.append(("  rejected", f"{count:,} x {quoted(problem)}"))
        if len(problems) > _SHOWN_PROBLEMS:
            lines.append(("  rejected", f"for {len(problems):,} reasons in all"))
    index = cache.index
    equal, keep = {"prompts": 0, "pairs": 0}, None
    sides = too_long.sides(truncate, cache)
    if inputs and targets:
        most = {"inputs": inputs, "targets": targets}
        keep = too_long.keep(cache, **most, on_too_long=on_too_long)
        if keep is None:
            equal = cuts.seen(cache, **most, cut=sides).equal
    pairs = int(index.num_pairs.sum()) - equal["pairs"]
    lines.append(("rows in this split", f"{len(cache):,}"))
    count = f"{index.num_responses:,}"
    lines.append(("responses", count + (f" in {pairs:,} pairs" if pairs else "")))
    rewards = index.response_reward[~np.isnan(index.response_reward)]
    if len(rewards):
        lines.append(("reward", f"mean {rewards.mean():.4g}, sd {rewards.std():.4g}"))
    labels = index.response_label[index.response_label >= 0]
    if len(labels):
        lines.append(("desirable", f"{labels.mean():.1%} of {len(labels):,} labels"))
    lengths = {"prompt": index.prompt_lengths, "response": index.response_lengths}
    for name, values in lengths.items():
        text = "  ".join(f"{k} {v:,}" for k, v in mostsummary(values).items())
        lines.append((f"{name} tokens", text))
    for name, rate in cache.summary.get("unknown_token_rate", {}).items():
        lines.append((f"unknown in {name}", f"{rate:.4%}"))
    if inputs and targets:
        packed = plan.pack(
            index,
            inputs=inputs,
            targets=targets,
            packing=packing,
            decoder_rows=decoder_rows,
            cut=sides,
            keep=keep,
        )
        full = packed.occupancy()
        if left_out := packed.left_out["rows"]:
            count = f"{left_out:,} of {len(cache):,} rows, all of each"
            lines.append(("left out as too long", count))
        for (name, values), cut, side in zip(
            lengths.items(),
            (inputs, targets),
            (sides.inputs, sides.targets),
            strict=True,
        ):
            count = f"{packed.truncated[f'{name}s']:,} of {len(values):,} at {cut}"
            count += ", at their start" if side == "start" else ""
            lines.append((f"truncated {name}s", count))
        shares = (
            f"encoder {full['encoder']:.1%}, {packed.shape.decoder_rows} decoder rows "
            f"{full['decoder']:.1%}"
        )
        lines.append((f"occupancy, packing {packing or 'off'}", shares))
        for name, length, then in (
            ("prompts", inputs, "never mismatched with each other"),
            ("pairs", targets, "left out"),
        ):
            if equal[name]:
                text = f"{equal[name]:,} once cut to {length} tokens: {then}"
                lines.append((f"equal {name}", text))
    width = max(len(name) for name, _ in lines)
    table = [f"{name:<{width}}  {text}" for name, text in lines]
    rejected = source.get("first_rejected", [])
    table += map(quoted, rejected)
    if rejected and (more := source["rows_rejected"] - len(rejected)):
        table.append(f"... and {more} more")
    if name := source.get("rejected_rows"):
        # Beside the folders of the splits, if this cache is where it was made.
        listing = cache.path.parent / pathlib.PurePath(name).name
        if listing.is_file():
            table.append(f"All rejected rows are listed in {listing}")
    return "\n".join(table)
