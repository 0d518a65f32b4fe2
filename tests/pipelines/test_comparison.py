"""The comparison of objectives: complete, at equal compute, and drawn."""

from __future__ import annotations

import re

import pytest

from jaxalign import configs, objectives
from jaxalign.pipelines import comparison
from jaxalign.report import comparison as page


def test_every_objective_but_the_start_is_compared():
    compared = {name for name, _ in comparison.SETTINGS.values()}
    assert compared == set(objectives.OBJECTIVES) - {"SFT"}


@pytest.mark.parametrize("name", comparison.SETTINGS)
def test_a_stage_is_a_gin_file_of_its_objective_with_equally_many_responses(name):
    stage = comparison.stage_of(name, steps=10)
    kind = objectives.OBJECTIVES[comparison.SETTINGS[name][0]]
    bindings = [f"{k} = {v}" for k, v in stage.settings.items()]
    configs.parse([f"runs/{name}.gin"], bindings)
    assert re.search(rf"OBJECTIVE = @.*\b{kind.__name__}\b", configs.config_str())
    per_prompt = 1 if kind.schema == "trajectory" else 2
    settings = stage.settings
    responses = int(settings["BATCH_SIZE"]) * int(settings["PACKING"]) * per_prompt
    assert responses == comparison.RESPONSES_PER_STEP


def test_an_unknown_objective_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="dro_v"):
        comparison.stage_of("drov", steps=10)


def test_the_page_shows_every_objective(tmp_path):
    table = {
        name: {"reward": [r, r + 0.1], "kl": [k, k], "tokens": [30.0, 31.0]}
        for name, r, k in (("sft", 0.5, 0.0), ("dpo", 0.8, 1.0), ("simpo", 0.1, 9.0))
    }
    wins = {a: {b: 0.5 for b in table if b != a} for a in table}
    path = tmp_path / "comparison.html"
    results = {"objectives": table, "win_rates": wins}
    page.write(path, results, steps=5, split="test")
    text = path.read_text()
    assert text.count("data:image/svg+xml") == 2
    assert all(f"<td>{name}</td>" in text for name in table)
    assert "0.850 ± 0.071" in text and "2 seeds" in text
    assert comparison.as_text(table).splitlines()[1].startswith("dpo")
