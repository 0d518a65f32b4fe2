"""Which gin file wins: whatever the order, a default never overrides what is named."""

from __future__ import annotations

import itertools

import pytest
from gin_macros import macro

from jaxalign import configs
from jaxalign.configs import ConfigError
from jaxalign.configs.scan import find, scan

# emb_dim, head_dim, num_decoder_layers, vocab_size and the vocabulary's class.
MODELS = {
    "t5_1_1_tiny": (64, 16, 2, 384, "Byte"),
    "t5_1_1_xxl": (4096, 64, 24, 32128, "SentencePiece"),
    "t5_1_0_xl": (1024, 128, 24, 32128, "SentencePiece"),
    "byt5_small": (1472, 64, 4, 384, "Byte"),
    "mt5_base": (768, 64, 12, 250112, "SentencePiece"),
}
RUNS = {"sft": (1e-3, 0), "dpo": (1e-4, 20), "dro_v": (1e-4, 150)}
OWN = """
LEARNING_RATE = 3e-5  # the run's own line sets it
BATCH_SIZE = 6  # what the run includes sets it
DROPOUT_RATE = 0.25  # what the network includes sets it
ADDED = %BATCH_SIZE
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network():
    import gin

    config = macro("MODEL").config
    return (
        config.emb_dim,
        config.head_dim,
        config.num_decoder_layers,
        config.vocab_size,
    ), str(gin.query_parameter("VOCABULARY/gin.macro.value"))


def check(model, run=None, own=False):
    shape, vocabulary = network()
    assert shape == MODELS[model][:4] and MODELS[model][4] in vocabulary
    if own:
        assert macro("MODEL").config.dropout_rate == 0.25
        assert macro("ADDED") == macro("BATCH_SIZE") == 6
        assert macro("LEARNING_RATE") == 3e-5
    if run:
        rate, warmup = RUNS[run]
        assert macro("WARMUP_STEPS") == warmup
        assert own or macro("LEARNING_RATE") == rate


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("model", MODELS)
def test_the_network_that_is_named_is_taken_in_every_order(folder, model, run):
    (folder / "own.gin").write_text(OWN)
    files = [f"models/{model}.gin", f"runs/{run}.gin", "own.gin"]
    for order in itertools.permutations(files):
        read = configs.parse(order)
        check(model, run, own=True)
        assert configs.network() == f"models/{model}.gin"
        tiny = any(path.name == "t5_1_1_tiny.gin" for path in read)
        assert tiny == (model == "t5_1_1_tiny")


def test_the_command_line_overrides_files_in_every_order(folder):
    (folder / "own.gin").write_text(OWN)
    files = ["models/byt5_small.gin", "runs/dpo.gin", "own.gin"]
    for order in itertools.permutations(files):
        configs.parse(order, ["LEARNING_RATE = 9.0", "models.T5Config.emb_dim = 32"])
        assert macro("LEARNING_RATE") == 9.0
        assert macro("MODEL").config.emb_dim == 32


def test_a_default_network_is_taken_where_none_is_named(folder):
    (folder / "own.gin").write_text(OWN)
    for order in (["runs/dpo.gin"], ["own.gin", "runs/dpo.gin"]):
        configs.parse(order)
        check("t5_1_1_tiny", "dpo", own=len(order) == 2)
        assert configs.network() == (
            "models/t5_1_1_tiny.gin (the default, as no --gin_file names another)"
        )


@pytest.mark.parametrize("model", ["t5_1_1_xxl", "byt5_small"])
def test_a_file_that_includes_run_and_network_in_any_order(folder, model):
    includes = ["include 'runs/dpo.gin'\n", f"include 'models/{model}.gin'\n", OWN]
    for order in itertools.permutations(includes):
        (folder / "mine.gin").write_text("".join(order))
        for files in (["mine.gin"], ["runs/dpo.gin", "mine.gin"]):
            configs.parse(files)
            check(model, "dpo", own=True)
            assert configs.network() == f"models/{model}.gin"


def test_own_files_among_themselves_keep_their_order(folder):
    (folder / "base.gin").write_text("LEARNING_RATE = 1.0\nBATCH_SIZE = 4\n")
    (folder / "a.gin").write_text("include 'base.gin'\nLEARNING_RATE = 2.0\n")
    (folder / "b.gin").write_text("LEARNING_RATE = 3.0\ninclude 'runs/sft.gin'\n")
    configs.parse(["a.gin", "b.gin"])
    assert macro("LEARNING_RATE") == 3.0
    configs.parse(["b.gin", "a.gin"])
    assert (macro("LEARNING_RATE"), macro("BATCH_SIZE")) == (2.0, 4)


def test_a_copy_of_what_a_run_includes_stays_below_the_run(folder):
    text = find("runs/train.gin", ()).read_text().replace("PACKING = 2", "PACKING = 5")
    (folder / "runs").mkdir()
    (folder / "runs" / "train.gin").write_text(text)
    configs.parse(["runs/dpo.gin", "models/byt5_small.gin"])
    check("byt5_small", "dpo")
    assert macro("PACKING") == 5


OWN_MODEL = """
from __gin__ import dynamic_registration
from jaxalign import models
include 'models/t5_1_1_small.gin'
models.T5Config.num_encoder_layers = 3
"""


def test_a_network_of_ones_own(folder):
    (folder / "net.gin").write_text(OWN_MODEL)
    for order in itertools.permutations(["net.gin", "runs/dpo.gin"]):
        configs.parse(order)
        config = macro("MODEL").config
        assert (config.emb_dim, config.num_encoder_layers) == (512, 3)
        assert configs.network() == "net.gin"
    # Named beside the file that it includes it is still the one network.
    configs.parse(["net.gin", "runs/dpo.gin", "models/t5_1_1_small.gin"])
    assert macro("MODEL").config.num_encoder_layers == 3


@pytest.mark.parametrize("other", ["t5_1_1_tiny", "t5_1_1_base", "mt5_base"])
def test_two_networks_that_are_named_are_refused(folder, other):
    first, second = "models/t5_1_1_small.gin", f"models/{other}.gin"
    (folder / "net.gin").write_text(OWN_MODEL)
    (folder / "mine.gin").write_text(f"include 'runs/dpo.gin'\ninclude '{second}'\n")
    for files in (
        [first, second, "runs/dpo.gin"],
        ["runs/dpo.gin", second, first],
        [first, "runs/dpo.gin", second],
        [first, "mine.gin"],
        ["net.gin", "mine.gin"],
    ):
        with pytest.raises(ConfigError, match="Two networks are named") as caught:
            configs.parse(files)
        assert second in str(caught.value)
        assert files[0] in str(caught.value) or first in str(caught.value)
    configs.parse([first, first, "runs/dpo.gin"])  # one network, named twice


def test_a_saved_configuration_keeps_its_network(folder):
    configs.parse(["models/byt5_small.gin", "runs/dpo.gin"], ["DATA = 'x'"])
    text = configs.config_str()
    (folder / "config.gin").write_text(text)
    configs.parse(["config.gin"])
    assert configs.config_str() == text and configs.network() == "config.gin"
    with pytest.raises(ConfigError, match=r"config.gin and models/t5_1_1_base.gin"):
        configs.parse(["config.gin", "models/t5_1_1_base.gin"])


def test_a_run_without_effect_is_refused(folder):
    with pytest.raises(ConfigError, match=r"Two runs.*runs/sft.gin and runs/dpo.gin"):
        configs.parse(["runs/sft.gin", "runs/dpo.gin"])
    (folder / "own.gin").write_text("OBJECTIVE = None\n")
    with pytest.raises(ConfigError, match=r"own.gin sets OBJECTIVE, so runs/dpo.gin"):
        configs.parse(["own.gin", "runs/dpo.gin"])
    configs.parse(["runs/dpo.gin", "own.gin"])
    assert macro("OBJECTIVE") is None


def test_networks_and_runs_set_different_things():
    # Both are packaged: where they met, their order would decide.
    def names(files):
        return {n for file in files for n in (*file.macros, *file.sets)}

    files = {name: scan(find(name, ()), ()) for name in configs.available()}
    networks = [file for name, file in files.items() if "models/" in name]
    paths = {f.path for file in networks for f in file.walk()}
    runs = [
        f
        for name, file in files.items()
        if "runs/" in name
        for f in file.walk()
        if f.path not in paths
    ]
    assert len(networks) > 20 and len(runs) > 20
    assert not names(networks) & names(runs)
