"""The report says what the runs hold, escapes it, and needs nothing else."""

from __future__ import annotations

import doctest
import html
import html.parser
import json
import re

import numpy as np
import pytest

from jaxalign import report
from jaxalign.report import charts, curves, runs
from jaxalign.training.metric_writers import write_calibration

DATA_FINGERPRINT = "ab12" * 16
POEM = "Roses are red 🌹\n\tand {braces} stay <script>alert('x')</script> & so on"


def make_run(folder, seed, *, steps=400, kind="dpo"):
    """A run directory as training writes it, with plausible numbers."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, steps + 1, 10):
        t = step / steps
        noise = rng.normal(size=12)
        line = {
            "step": step,
            "time": 1.75e9 + step * 0.4,
            "train/loss": 0.69 * np.exp(-1.5 * t) + 0.03 * noise[0],
            "train/learning_rate": 1e-3 * min(1, step / 60) * (1 - 0.9 * t),
            "train/grad_norm": abs(1.2 + 0.3 * noise[1]) + (80.0 if step == 50 else 0),
            "train/tokens_per_second": 9000 + 400 * noise[2],
            "train/log_ratios/mean": 6 * t + 0.4 * noise[3],
            "train/logps/chosen": -60 - 5 * t + noise[4],
            "train/batch/tokens": 4096.0,
        }
        if kind in ("dpo", "kto"):
            line["train/rewards/chosen"] = 0.3 * t + 0.05 * noise[5]
            line["train/rewards/rejected"] = -1.2 * t + 0.05 * noise[6]
            line["train/rewards/margins"] = 1.5 * t + 0.08 * noise[7]
        if kind == "dpo":
            line["train/rewards/accuracies"] = min(1, 0.5 + 0.4 * t + 0.03 * noise[8])
        if kind == "dro_v":
            line["train/value/mean"] = 0.4 * t + 0.02 * noise[9]
            line["train/value/std"] = 0.6 * t + 0.02 * noise[10]
            line["train/value/correlation"] = 0.7 * t + 0.03 * noise[11]
        lines.append(line)
        if step % 80 == 0:
            lines.append(
                {
                    "step": step,
                    "time": line["time"],
                    "eval/loss": 0.7 * np.exp(-1.2 * t),
                    "eval/rewards/accuracies": 0.5 + 0.3 * t,
                }
            )
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    if kind == "dro_v":
        values = rng.normal(size=500)
        write_calibration(folder, steps, values, values + rng.normal(size=500))
    manifest = {
        "objective": kind.upper(),
        "status": "finished",
        "step": steps,
        "seed": 7,
        "batch_size": 16,
        "model": {
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "emb_dim": 64,
            "vocab_size": 384,
            "dtype": "float32",
        },
        "feature_lengths": {"inputs": 256, "targets": 128},
        "data_fingerprint": DATA_FINGERPRINT,
        "params_fingerprint": f"{seed:02x}" * 32,
        "parents": {"initial": "cd" * 32, "reference": "cd" * 32},
        "git_revision": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"jaxalign": "0.1.0", "jax": "0.10.2", "numpy": "2"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.gin").write_text(
        "# Macros:\nTRAIN_STEPS = 400\nDATA = 'pairs.jsonl'\n"
        f"# Parameters:\noptimizer.learning_rate = 0.{seed:03d}\n"
        "dataset.feature_lengths = \\\n    {'inputs': 256,\n     'targets': 128}\n"
    )
    (folder / "samples").mkdir()
    for step in (200, steps):
        rows = [
            {
                "prompt": f"Write poem {i}\nin two lines" + " please" * (i == 2) * 900,
                "response": f"{kind} says {step} 😀 " + "word " * 9 * i if i else POEM,
                "target": "Violets are blue",
                "logp": -12.5 - i,
                "num_tokens": 20 + i,
            }
            for i in range(4)
        ]
        (folder / "samples" / f"{step}.jsonl").write_text(
            "".join(
                json.dumps(row, ensure_ascii=i % 2 == 0) + "\n"
                for i, row in enumerate(rows)
            ),
            encoding="utf-8",
        )
    return folder


def make_quickstart(folder):
    for seed, kind in enumerate(("sft", "dro_v", "kto", "dpo"), start=1):
        make_run(folder / kind, seed, kind=kind)
    results = {
        "sft": {"true_reward": 0.412, "ci95": [0.39, 0.434], "mean_tokens": 21.4},
        "dro_v": {
            "true_reward": 0.5731,
            "ci95": [0.553, 0.5932],
            "win_rate_vs_sft": 0.681,
            "win_rate_ci95": [0.652, 0.71],
            "mean_tokens": 24.0,
        },
        "kto": {"true_reward": 0.521, "ci95": [0.5, 0.542], "win_rate_vs_sft": 0.63},
        "dpo": {"true_reward": 0.604, "ci95": [0.585, 0.623], "win_rate_vs_sft": 0.71},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


class _Checker(html.parser.HTMLParser):
    """Counts tags, checks that they nest, collects the text and the references."""

    VOID = {"meta"}

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.references, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        self.references += [v for k, v in attrs if k in names]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, (tag, self.stack[-5:])
        self.stack.pop()

    def handle_data(self, data):
        self.text.append(data)


def check(path):
    page = path.read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.stack == []
    return page, checker


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = make_quickstart(tmp_path_factory.mktemp("runs") / "quickstart")
    path = report.write_report([folder], None)
    assert path.resolve() == (folder / "report.html").resolve()
    return check(path)


def test_page_needs_no_network(quickstart):
    page, checker = quickstart
    assert checker.references == []
    assert not re.search(r"https?://|//cdn|@import|url\(", page)
    assert checker.tags.count("script") == 1  # the page's own
    assert len(page) < 1_500_000


def test_results_are_on_the_page(quickstart):
    page, checker = quickstart
    text = "".join(checker.text)
    for expected in ("0.573", "[0.553, 0.593]", "68.1%", "[65.2, 71.0]", "24"):
        assert expected in text
    assert 'aria-label="0.604, 95% interval 0.585 to 0.623"' in page
    assert page.count('<rect class="bar') == 4


def test_settings_and_fingerprints_are_on_the_page(quickstart):
    page, checker = quickstart
    text = "".join(checker.text)
    assert f'title="{DATA_FINGERPRINT}"' in page
    assert f'title="{"02" * 32}"' in page  # of one run only
    for expected in ("TRAIN_STEPS", "pairs.jsonl", "0.003", "2+2 layers, width 64"):
        assert expected in text
    assert "400 (finished)" in text


def test_every_metric_has_one_chart_with_all_its_curves(quickstart):
    page, _ = quickstart
    figures = re.findall(r"<figure>.*?</figure>", page, flags=re.S)
    names = [re.search(r"<b>(.*?)</b>", f)[1] for f in figures]
    assert len(names) == len(set(names))
    assert {
        "loss", "log_ratios/mean", "rewards/chosen", "rewards/rejected",
        "rewards/margins", "rewards/accuracies", "learning_rate", "grad_norm",
        "tokens_per_second",
        "value/mean", "value/std", "value/correlation", "value calibration",
    } <= set(names)  # fmt: skip
    loss = figures[names.index("loss")]
    labels = re.findall(r'data-label="(.*?)"', loss)
    assert sorted(labels) == sorted(
        run + split
        for run in ("sft", "dro_v", "kto", "dpo")
        for split in ("", " (eval)")
    )
    assert "only kto, dpo" in figures[names.index("rewards/margins")]
    assert "axis clipped; extreme 8" in figures[names.index("grad_norm")]
    assert figures[names.index("value calibration")].count("<circle") == 10


def test_samples_are_side_by_side_escaped_and_whole(quickstart):
    page, checker = quickstart
    assert "<script>alert" not in page
    assert html.escape(POEM) in page  # newline, tab and emoji as they were
    text = "".join(checker.text)
    assert text.count(POEM) == 4
    assert "dpo says 400 😀" in text and "dpo says 200" not in text
    assert text.count("log p -12.5") == 4
    assert "… " in text and " more characters" in text  # the 6300-character prompt
    articles = re.findall(r"<article>.*?</article>", page, flags=re.S)
    assert len(articles) == 4
    assert all(a.count('class="response ') == 4 for a in articles)


def test_runs_with_missing_pieces_say_so(tmp_path):
    whole = make_run(tmp_path / "whole", 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    (broken / "samples").mkdir(parents=True)
    (broken / "metrics.jsonl").write_text("not json\n{}\n")
    (broken / "manifest.json").write_text("{")
    (broken / "calibration.json").write_text('{"bins": [{"value": 1}]}')
    (broken / "samples" / "5.jsonl").write_text('{"prompt": "a"}\n"text"\n{"pro')
    path = report.write_report([whole, empty, broken], tmp_path / "out" / "r.html")
    assert path == tmp_path / "out" / "r.html"
    text = "".join(check(path)[1].text)
    for expected in (
        "no metrics.jsonl", "no config.gin", "no manifest.json", "no samples",
        "metrics.jsonl unreadable", "line 1", "manifest.json unreadable",
        "a malformed line in samples/5.jsonl", "calibration.json has no bins",
    ):  # fmt: skip
        assert expected in text, expected
    only_empty = report.write_report([empty])
    assert "No run has recorded a metric yet." in "".join(check(only_empty)[1].text)


def test_non_finite_values_are_marked(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 1.5, "train/log_ratios/mean": "NaN"}\n'
        '{"step": 2, "train/loss": "NaN"}\n{"step": 3, "train/loss": "Infinity"}\n'
    )
    text = "".join(check(report.write_report([tmp_path]))[1].text)
    assert "not finite from step 2" in text
    assert "never finite" in text
    assert "✕" in text


def test_names_are_told_apart_and_hostile_ones_escaped(tmp_path):
    paths = [make_run(tmp_path / p / "<b>dpo", i) for i, p in enumerate("ab")]
    loaded = runs.load(paths)
    assert [run.name for run in loaded] == ["a/<b>dpo", "b/<b>dpo"]
    page, _ = check(report.write_report(paths))
    assert "a/&lt;b&gt;dpo" in page and "/<b>dpo" not in page


def test_absent_directory_names_the_nearest(tmp_path):
    (tmp_path / "dro_v").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected a run.*Nearest: dro_v"):
        report.write_report([tmp_path / "drov"])


def test_long_curves_are_thinned_without_losing_extremes(tmp_path):
    steps = np.arange(1, 100_001)
    values = np.sin(steps / 3000.0)
    values[54_321] = 7.0
    x, y = charts.thin(steps, values)
    assert len(x) <= 360 and y.max() == 7.0 and (np.diff(x) > 0).all()
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            file.write(f'{{"step": {step}, "train/loss": {value}}}\n')
    page, _ = check(report.write_report([tmp_path]))
    assert len(page) < 60_000


def test_smoothing_is_a_moving_mean():
    steps, values = np.arange(100), np.tile([0.0, 1.0], 50)
    x, y = charts.smooth(steps, values)
    np.testing.assert_array_equal(x, steps)
    # Windows of three: 1/3 and 2/3; the ends keep their own value.
    np.testing.assert_allclose(y[:4], [0.0, 1 / 3, 2 / 3, 1 / 3], atol=1e-12)
    np.testing.assert_allclose(y[-1], 1.0)
    line = np.linspace(3, 5, 500)
    np.testing.assert_allclose(charts.smooth(np.arange(500), line)[1][[0, -1]], [3, 5])


def test_curve_geometry():
    """The first and last point of a line stand on the plot's edges."""
    s = charts.Series("r", 0, np.array([0, 10]), np.array([0.0, 1.0]))
    svg, notes = charts.line_chart([s], title="accuracies", unit_interval=True)
    assert notes == []
    assert 'd="M50.0 194.0L388.0 10.0"' in svg  # left-bottom to right-top


def test_calibration_bins(tmp_path):
    values = np.arange(100.0)
    write_calibration(tmp_path, 3, values, 2 * values, bins=4)
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["step"] == 3
    assert found["bins"][0] == {"value": 12.0, "target": 24.0, "count": 25}
    assert [b["count"] for b in found["bins"]] == [25] * 4


def test_the_name_of_an_axis_covers_no_tick():
    svg = charts.calibration_chart([("r", 0, [(-2.0, -2.0, 9.0), (3.0, 3.0, 9.0)])])
    right, name = re.search(r'class="name" x="(\d+)" y="\d+">(.*?)<', svg).groups()
    ticks = re.findall(r'class="x" x="([\d.]+)" y="\d+">(.*?)<', svg)
    assert name == "predicted value" and len(ticks) >= 2
    ends = [float(x) + 3 * len(text) for x, text in ticks]
    # Eleven pixels high, a letter is about six wide.
    assert max(ends) < int(right) - 6 * len(name)


@pytest.mark.parametrize("module", [charts, runs, report])
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


def test_split_name():
    assert curves.split_name("eval/rewards/chosen") == ("eval", "rewards/chosen")
    assert curves.split_name("rewards/chosen") == ("train", "rewards/chosen")
