"""Columns by axis: from a JSON Lines file to what an objective's loss is given."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest

from jaxalign import batch as batches
from jaxalign import models, objectives
from jaxalign.data.bad_rows import DataError
from jaxalign.data.feed import Feed
from jaxalign.data.records import convert
from jaxalign.prepare.rows import build_rows
from jaxalign.training import inputs
from jaxalign.vocabularies import ByteVocabulary

batches.add_column("pair_stakes", "BQ")
batches.add_column("prompt_topic", "BPM", size=2, optional=True, empty=-1.0)
batches.add_column("decoder_old_logps", "BKD", source="pass")


@dataclasses.dataclass(frozen=True)
class WeighedDPO(objectives.DPO):
    """DPO whose pairs weigh as much as their rows say."""

    columns: ClassVar[tuple[str, ...]] = (
        "response_ref_logps",
        "pair_stakes",
        "prompt_topic",
    )

    def output(self, batch, logps):
        weighed = {**batch, "pair_mask": batch["pair_mask"] * batch["pair_stakes"]}
        return super().output(weighed, logps)


MODEL = models.T5(models.T5Config(259, 8, 1, 8, 8, 1, 1))
OBJECTIVE = WeighedDPO(MODEL)
DOUBT = ("pair_doubt",)
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def built(tmp_path, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = inputs.Dataset(
        data=str(path),
        batch_size=2,
        eval_fraction=0.0,
        packing=None,
        shuffle=False,
        cache_dir=str(tmp_path / "cache"),
        feature_lengths={"inputs": 8, "targets": 8},
        **settings,
    )
    return inputs.build(dataset, OBJECTIVE, ByteVocabulary()).train


def test_a_column_comes_from_the_file_to_the_loss(tmp_path):
    rows = [
        {**PAIR, "stakes": 0.25, "prompt_topic": [1, 2]},
        {**PAIR, "prompt": "q", "stakes": 3},
    ]
    feed = built(tmp_path, rows, field_map={"pair_stakes": "stakes"})
    batch = next(iter(feed.evaluation_batches()))
    np.testing.assert_array_equal(batch["pair_stakes"], [[0.25], [3.0]])
    np.testing.assert_array_equal(batch["prompt_topic"][:, 0], [[1, 2], [-1, -1]])
    batches.check({**batch, "response_ref_logps": batch["response_mask"]})
    assert feed.shapes["prompt_topic"].shape == batch["prompt_topic"].shape
    logps = np.zeros(batch["response_mask"].shape, np.float32)
    scored = {**batch, "response_ref_logps": logps}
    loss = OBJECTIVE.output(scored, logps).sums["pairs"]
    assert float(loss) == pytest.approx(3.25 * np.log(2), rel=1e-6)


def test_records_of_one_prompt_may_lack_what_is_optional(tmp_path):
    batches.add_column("pair_doubt", "BQ", optional=True, empty=0.5)
    records = [
        {"chosen": "good", "rejected": "bad", "pair_doubt": 0.1},
        {"chosen": "fine", "rejected": "worse"},
    ]
    rows = [
        row
        for record in records
        for row in convert({"prompt": "p", **record}, "preference", columns=DOUBT)
    ]
    (row,) = build_rows(rows, "preference", ByteVocabulary(), key="k")
    assert row.columns == {"pair_doubt": [0.1, 0.5]}


def test_a_row_without_its_column_is_told(tmp_path):
    with pytest.raises(DataError, match="pair_stakes"):
        built(tmp_path, [PAIR])


def test_a_prepared_folder_without_the_column_is_told(tmp_path):
    feed = built(tmp_path, [{**PAIR, "pair_stakes": 1.0}])
    source = (feed.caches[0], feed.plans[0], 1.0)
    other = Feed([source], batch_size=1, row_columns=["response_ref_logps"])
    with pytest.raises(ValueError, match="has no column 'response_ref_logps'"):
        other.batch(0)


def test_a_joined_column_of_tokens_is_scattered_by_segment(tmp_path):
    feed = built(tmp_path, [{**PAIR, "pair_stakes": 1.0}])
    index = feed.caches[0].index
    values = [np.arange(1.0, n + 1) for n in index.response_lengths]
    batch = feed.with_columns({"decoder_old_logps": [values]}).batch(0)
    weights, found = batch["decoder_loss_weights"], batch["decoder_old_logps"]
    assert found.dtype == np.float32 and (found[weights == 0] == 0).all()
    for row, kept in zip(found[0], weights[0], strict=True):
        np.testing.assert_array_equal(row[kept > 0], np.arange(1, kept.sum() + 1))


@pytest.mark.parametrize(
    ("name", "axes", "told"),
    [
        ("pair_odd", "BR", "go together"),
        ("pair_stakes", "BQM", "another column 'pair_stakes'"),
    ],
)
def test_names_axes_and_columns_go_together(name, axes, told):
    with pytest.raises(ValueError, match=told):
        batches.add_column(name, axes)
