"""``jaxalign.train`` is the verb ``jaxalign train``."""

from __future__ import annotations

import jax
import pytest
import tiny_run

import jaxalign
from jaxalign import cli, configs, models, vocabularies
from jaxalign.interop import huggingface
from jaxalign.training import run_directory


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with pairs and a Hugging Face folder of a tiny network."""
    folder = tmp_path_factory.mktemp("call")
    tiny_run.write_data(folder / "pairs.jsonl", 24)
    model = models.T5(tiny_run.CONFIG)
    params = models.init_params(model, jax.random.key(0))
    vocabulary = vocabularies.ByteVocabulary(extra_ids=125)
    huggingface.write(folder / "tiny", params, model, vocabulary)
    return folder


SETTINGS = {
    "TASK_FEATURE_LENGTHS": {"inputs": 12, "targets": 12},
    "SCHEDULE": "@schedules.linear()",
    "PACKING": 1,
    "WARMUP_STEPS": 1,
}


def test_a_call_ends_with_the_parameters_of_the_command(work):
    policy = jaxalign.train(
        objective="dpo",
        data=work / "pairs.jsonl",
        checkpoint=work / "tiny",
        run_dir=work / "call",
        steps=2,
        batch_size=8,
        CACHE_DIR=work / "cache",
        **SETTINGS,
    )
    flags = [
        "--gin_file=runs/dpo.gin",
        f"--data={work / 'pairs.jsonl'}",
        f"--checkpoint={work / 'tiny'}",
        f"--run_dir={work / 'command'}",
        "--steps=2",
        "--batch_size=8",
        f"--gin.CACHE_DIR={work / 'cache'}",
        *(f"--gin.{name}={value}" for name, value in SETTINGS.items()),
    ]
    assert cli.main(["train", *flags]) == 0
    call, command = (
        run_directory.read_manifest(work / name) for name in ("call", "command")
    )
    assert call["status"] == command["status"] == "finished"
    assert call["params_fingerprint"] == command["params_fingerprint"]
    assert policy.network.meta["step"] == 2
    (texts,) = policy.generate(["say 3"], max_new_tokens=4, temperature=0)
    again = jaxalign.load(work / "command")
    assert [texts] == again.generate(["say 3"], max_new_tokens=4, temperature=0)
    assert policy.score(["say 3"], ["it is 3"]) == again.score(["say 3"], ["it is 3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "dpp"}, r"runs/dpp\.gin.*runs/dpo\.gin"),
        ({"BATA": 0.2}, "BATA.*BETA"),
        ({"BATCH_SIZE": 8}, "BATCH_SIZE is the argument batch_size"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_mistakes_are_named(work, arguments, message):
    given = {"objective": "dpo", "data": work / "pairs.jsonl", "run_dir": work / "x"}
    with pytest.raises((configs.ConfigError, OSError), match=f"(?s){message}"):
        jaxalign.train(**{**given, **arguments})
    assert not (work / "x").exists()
