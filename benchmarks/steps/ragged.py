"""What lengths as they come cost: packing, the input pipeline, more examples."""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks.steps import cases
from benchmarks.steps.results import Result

_PIECES = 4000


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return folder / "jaxalign" / "bench"


def data_file() -> Path:
    """Real pairs of responses: BENCH_DATA, an ``alpaca_eval`` annotations file.

    Raises:
      FileNotFoundError: if it is not there.
    """
    default = "../shared/data/alpaca_eval/annotations.jsonl"
    path = Path(os.environ.get("BENCH_DATA", default))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; BENCH_DATA names alpaca_eval's annotations.jsonl"
        )
    return path.absolute()


def _pieces(path: Path) -> Path:
    """A SentencePiece model of the file's own text, trained once."""
    import sentencepiece

    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    model = _cache() / f"{digest}-{_PIECES}.model"
    if model.exists():
        return model
    model.parent.mkdir(parents=True, exist_ok=True)
    texts = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            for text in (row["instruction"], *(r["text"] for r in row["responses"])):
                texts += text.splitlines()
    # Trainers slow down with length and number; a sample has the same pieces.
    random.Random(0).shuffle(texts)
    texts = [text[:1000] for text in texts if text.strip()][:10_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(model.with_suffix("")),
        vocab_size=_PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model


def _request(
    packing: int | None, size: str, *, inputs: int, targets: int, batch: int
) -> dict[str, Any]:
    path = data_file()
    return {
        "gin_files": ["runs/dpo.gin", f"models/t5_1_1_{size}.gin"],
        "bindings": [
            "TRAIN_STEPS = 1000",
            f"DATA = 'alpaca_eval:{path}'",
            "ON_BAD_ROW = 'skip'",
            # Pieces and T5's head also where the size's own file is over bytes.
            "VOCABULARY = @vocabularies.SentencePieceVocabulary()",
            f"VOCABULARY_PATH = {str(_pieces(path))!r}",
            "models.T5Config.vocab_size = 32128",
            f"CACHE_DIR = {str(_cache() / 'data')!r}",
            f"TASK_FEATURE_LENGTHS = {{'inputs': {inputs}, 'targets': {targets}}}",
            f"BATCH_SIZE = {batch}",
            f"PACKING = {packing}",
        ],
    }


def packed(steps: int, _: int) -> Result:
    """Real tokens per second of a DPO step, rows packed against rows padded."""
    from benchmarks.steps.suite import measure

    rates, found = {}, {}
    for name, packing in (("padded", None), ("packed", 1)):
        # Longer than all responses but 3 %, packed or not: a step costs the same.
        request = _request(packing, "tiny", inputs=256, targets=1024, batch=1)
        one = measure(
            {"kind": "train_step", "data": True, "steps": 2 * steps} | request
        )
        seconds = statistics.mean(one["seconds"])
        rates[name] = one["real_tokens"] / seconds
        found[name] = {
            "real_tokens_per_second": rates[name],
            "share_of_positions_that_hold_tokens": one["real_tokens"]
            / one["positions"],
            "seconds": one["seconds"],
        }
    result = Result(
        "ragged-packed",
        one["device"],
        median_seconds=statistics.median(one["seconds"]),
        real_tokens_per_second=rates["packed"],
        peer="the same rows, one example each",
        note="ratio: real tokens per second, packed / padded",
        more=found,
    )
    return result.judge(rates["packed"] / rates["padded"], cases.PACKED_TARGET)


def input_pipeline(steps: int, _: int) -> Result:
    """Real tokens per second of the feed alone, against a base DPO step."""
    from benchmarks.steps.suite import measure

    request = _request(1, "base", inputs=128, targets=128, batch=1)
    feed = measure({"kind": "feed"} | request)
    step = measure(
        {"kind": "train_step", "data": True, "steps": max(2, steps // 2)} | request
    )
    consumed = step["real_tokens"] / statistics.median(step["seconds"])
    result = Result(
        "input-pipeline",
        feed["device"],
        real_tokens_per_second=feed["real_tokens_per_second"],
        peer="the DPO step of T5 base",
        note="ratio: tokens delivered / tokens consumed, per second",
        more={"feed": feed, "step_tokens_per_second": consumed},
    )
    return result.judge(feed["real_tokens_per_second"] / consumed, cases.FEED_TARGET)


def examples_growth(_: int, rounds: int) -> Result:
    """Seconds per real token of the feed with 100,000 examples, against 1,000."""
    from benchmarks.steps.suite import measure

    counts = (1_000, 10_000, 100_000)
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    # In turns, and at least three: the feed alone is quick, and so is noise.
    for _ in range(max(3, rounds)):
        for count in counts:
            request = {
                "kind": "feed",
                "gin_files": ["runs/dpo.gin", "models/t5_1_1_small.gin"],
                "bindings": [
                    "TRAIN_STEPS = 1000",
                    "VOCABULARY = @vocabularies.ByteVocabulary()",
                    f"DATA = {str(_synthetic_pairs(count))!r}",
                    f"CACHE_DIR = {str(_cache() / 'data')!r}",
                    "TASK_FEATURE_LENGTHS = {'inputs': 128, 'targets': 256}",
                    "BATCH_SIZE = 8",
                    "PACKING = 2",
                ],
            }
            found[count].append(measure(request))
    rates = [
        statistics.median(f["real_tokens_per_second"] for f in found[count])
        for count in counts
    ]
    result = Result(
        "examples-1k-to-100k",
        found[1_000][0]["device"],
        real_tokens_per_second=rates[-1],
        note="ratio: tokens delivered per second, a size / the best smaller one",
        more={"examples": found},
    )
    # A small set pays for more epochs in as many batches; that is not growth.
    worst = min(rate / max(rates[:i]) for i, rate in enumerate(rates) if i)
    return result.judge(worst, 1 / cases.GROWTH_TARGET)


def _synthetic_pairs(count: int) -> Path:
    """Pairs of random words whose lengths spread as those of real text do."""
    path = _cache() / f"pairs_{count}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)

    def words(mean: float) -> str:
        length = max(1, min(60, int(draw.lognormvariate(0.0, 0.8) * mean)))
        return " ".join(f"{draw.randrange(16**4):x}" for _ in range(length))

    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"prompt": words(10), "chosen": words(20), "rejected": words(20)}
            file.write(json.dumps(row) + "\n")
    part.replace(path)
    return path
