"""What happened to the rows: kept, rejected, lengths, unknown tokens, truncation."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign.data.bad_rows import BadRows, quoted
from jaxalign.data.cache import TokenizedCache
from jaxalign.data.rows import Index, Row
from jaxalign.vocabularies import UNK_ID

_PERCENTILES = (50, 90, 99)
_SHOWN_PROBLEMS = 20


class Tally:
    """Counts over one cache while its rows are written."""

    def __init__(self) -> None:
        self.rows = self.pairs = 0
        self.lengths: dict[str, list[int]] = {"prompts": [], "responses": []}
        self.unknown = dict.fromkeys(self.lengths, 0)

    def add(self, row: Row) -> None:
        """Counts one cache row."""
        self.rows += 1
        self.pairs += len(row.pairs)
        for name, lengths in self.lengths.items():
            for ids in getattr(row, name):
                lengths.append(len(ids))
                self.unknown[name] += int(np.count_nonzero(ids == UNK_ID))

    def summary(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON-ready summary that is stored with the cache.

        Args:
          source: counts over the rows read, shared by all splits.
        """
        return {
            "source": dict(source),
            "rows": self.rows,
            "responses": len(self.lengths["responses"]),
            "pairs": self.pairs,
            "prompt_tokens": lengths_summary(self.lengths["prompts"]),
            "response_tokens": lengths_summary(self.lengths["responses"]),
            "unknown_token_rate": {
                name: self.unknown[name] / max(sum(lengths), 1)
                for name, lengths in self.lengths.items()
            },
        }


def source_counts(
    read: int, kept: int, left_out: int, responses_left_out: int, bad: BadRows
) -> dict[str, Any]:
    """Counts over the rows read: every one of them is kept, left out or rejected."""
    return {
        "rows_read": read,
        "rows_kept": kept,
        "rows_left_out": left_out,
        "rows_rejected": bad.total,
        "responses_left_out": responses_left_out,
        "rejected_by_problem": dict(bad.by_problem),
        "first_rejected": [str(row) for row in bad.first],
        "rejected_rows": bad.listing.name if bad.listing and bad.total else None,
    }


def lengths_summary(lengths: Any) -> dict[str, int]:
    """Percentiles, maximum and total of token counts, EOS included."""
    values = np.asarray(lengths)
    found = np.percentile(values, _PERCENTILES, method="higher")
    result = {f"p{p}": int(v) for p, v in zip(_PERCENTILES, found, strict=True)}
    return result | {"max": int(values.max()), "total": int(values.sum())}


def describe(
    cache: TokenizedCache,
    *,
    inputs: int | None = None,
    targets: int | None = None,
    packing: int | None = None,
    decoder_rows: int | None = None,
) -> str:
    """The summary of a cache as a table.

    Args:
      inputs: the length prompts are cut to (TASK_FEATURE_LENGTHS); with ``targets``
        the table also says what is truncated and how full packed rows are.
    """
    s = cache.summary
    source = s.get("source", {})
    lines = [
        ("cache", str(cache.path)),
        ("schema", cache.schema),
        ("fingerprint", cache.fingerprint[:16]),
    ]
    if source:
        left_out = source["rows_left_out"]
        detail = f"{source['rows_kept']:,} kept, {source['rows_rejected']:,} rejected"
        if left_out:
            detail += f", {left_out:,} left out by the task"
        lines.append(("rows read", f"{source['rows_read']:,}: {detail}"))
        if source["responses_left_out"]:
            count = f"{source['responses_left_out']:,} of rows kept"
            lines.append(("  responses left out", count))
        problems = sorted(source["rejected_by_problem"].items(), key=lambda p: -p[1])
        for problem, count in problems[:_SHOWN_PROBLEMS]:
            lines.append(("  rejected", f"{count:,} x {quoted(problem)}"))
        if len(problems) > _SHOWN_PROBLEMS:
            lines.append(("  rejected", f"for {len(problems):,} reasons in all"))
    index = cache.index
    pairs = int(index.num_pairs.sum())
    equal = {"prompts": 0, "pairs": 0}
    if inputs and targets:
        from jaxalign.data import cuts

        equal = cuts.seen(cache, inputs=inputs, targets=targets).equal
    pairs -= equal["pairs"]
    lines.append(("rows in this split", f"{len(cache):,}"))
    count = f"{index.num_responses:,}"
    lines.append(("responses", count + (f" in {pairs:,} pairs" if pairs else "")))
    rewards = index.response_reward[~np.isnan(index.response_reward)]
    if len(rewards):
        lines.append(("reward", f"mean {rewards.mean():.4g}, sd {rewards.std():.4g}"))
    labels = index.response_label[index.response_label >= 0]
    if len(labels):
        lines.append(("desirable", f"{labels.mean():.1%} of {len(labels):,} labels"))
    for name, lengths in (
        ("prompt tokens", index.prompt_lengths),
        ("response tokens", index.response_lengths),
    ):
        found = lengths_summary(lengths)
        text = "  ".join(f"{k} {v:,}" for k, v in found.items())
        lines.append((name, text))
    for name, rate in s.get("unknown_token_rate", {}).items():
        lines.append((f"unknown in {name}", f"{rate:.4%}"))
    if inputs and targets:
        lines += _feed_lines(index, inputs, targets, packing, decoder_rows)
        for name, length, then in (
            ("prompts", inputs, "never mismatched with each other"),
            ("pairs", targets, "left out"),
        ):
            if equal[name]:
                text = f"{equal[name]:,} once cut to {length} tokens: {then}"
                lines.append((f"equal {name}", text))
    width = max(len(name) for name, _ in lines)
    table = "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
    rejected = source.get("first_rejected", [])
    if rejected:
        more = source["rows_rejected"] - len(rejected)
        tail = [f"... and {more} more"] if more else []
        table += "\n" + "\n".join([*map(quoted, rejected), *tail])
    if name := source.get("rejected_rows"):
        # Beside the folders of the splits, if this cache is where it was made.
        listing = cache.path.parent / pathlib.PurePath(name).name
        if listing.is_file():
            table += f"\nAll rejected rows are listed in {listing}"
    return table


def _feed_lines(
    index: Index,
    inputs: int,
    targets: int,
    packing: int | None,
    decoder_rows: int | None,
) -> list[tuple[str, str]]:
    from jaxalign.data import plan

    packed = plan.pack(
        index,
        inputs=inputs,
        targets=targets,
        packing=packing,
        decoder_rows=decoder_rows,
    )
    full = packed.occupancy()
    counts = (
        ("prompts", len(index.prompt_lengths), inputs),
        ("responses", len(index.response_lengths), targets),
    )
    lines = [
        (f"truncated {name}", f"{packed.truncated[name]:,} of {count:,} at {length}")
        for name, count, length in counts
    ]
    shares = (
        f"encoder {full['encoder']:.1%}, {packed.shape.decoder_rows} decoder rows "
        f"{full['decoder']:.1%}"
    )
    return [*lines, (f"occupancy, packing {packing or 'off'}", shares)]
