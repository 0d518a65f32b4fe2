"""The gin files of the public models: they parse, and their sizes are right."""

import pathlib

import foreign_folders
import gin
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign import models, vocabularies

CONFIGS = pathlib.Path(jaxalign.__file__).parents[1] / "gin_configs"
SIZES = ("small", "base", "large", "xl", "xxl")

# E, H, D, F, encoder layers, decoder layers.
T5_1_0 = {
    "small": (512, 8, 64, 2048, 6, 6),
    "base": (768, 12, 64, 3072, 12, 12),
    "large": (1024, 16, 64, 4096, 24, 24),
    "xl": (1024, 32, 128, 16384, 24, 24),
    "xxl": (1024, 128, 128, 65536, 24, 24),
}
T5_1_1 = {
    "small": (512, 6, 64, 1024, 8, 8),
    "base": (768, 12, 64, 2048, 12, 12),
    "large": (1024, 16, 64, 2816, 24, 24),
    "xl": (2048, 32, 64, 5120, 24, 24),
    "xxl": (4096, 64, 64, 10240, 24, 24),
}
BYT5 = {
    "small": (1472, 6, 64, 3584, 12, 4),
    "base": (1536, 12, 64, 3968, 18, 6),
    "large": (1536, 16, 64, 3840, 36, 12),
    "xl": (2560, 32, 64, 6720, 36, 12),
    "xxl": (4672, 64, 64, 12352, 36, 12),
}
# family -> (shapes, vocabulary, gated, tied).
FAMILIES = {
    "t5_1_0": (T5_1_0, 32128, False, True),
    "t5_1_1": (T5_1_1, 32128, True, False),
    "flan_t5": (T5_1_1, 32128, True, False),
    "mt5": (T5_1_1, 250112, True, False),
    "byt5": (BYT5, 384, True, False),
}
# Files of one size or of odd ones: shape, vocabulary, gated, tied, and what the field
# says of their parameters, in units of the last digit.
OTHERS = {
    "ul2_20b": ((4096, 16, 256, 16384, 32, 32), 32128, True, False, 19.5e9),
    "flan_ul2": ((4096, 16, 256, 16384, 32, 32), 32128, True, False, 19.5e9),
    "madlad400_3b": ((1024, 16, 128, 8192, 32, 32), 256000, True, False, 2.94e9),
    "madlad400_7b": ((2048, 16, 128, 8192, 48, 48), 256000, True, False, 8.3e9),
    "madlad400_10b": ((2048, 32, 128, 16384, 32, 32), 256000, True, False, 10.7e9),
    "aya_101": (T5_1_1["xxl"], 250112, True, False, 12.9e9),
    "codet5p_220m": (T5_1_0["base"], 32100, False, True, 223e6),
    "codet5p_770m": (T5_1_0["large"], 32100, False, True, 738e6),
    "umt5_small": (T5_1_1["small"], 256384, True, False, 307e6),
    "umt5_base": (T5_1_1["base"], 256384, True, False, 592e6),
    "umt5_xl": (T5_1_1["xl"], 256384, True, False, 3.77e9),
    "umt5_xxl": (T5_1_1["xxl"], 256384, True, False, 13.0e9),
}
# As counted from the published checkpoints.
PUBLISHED = {
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_xl": 2_851_598_336,
    "t5_1_0_xxl": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
}


def count(shape, vocab, gated, tied, tables=2):
    """Parameters by hand: projections, norms, bias tables, embedding, head."""
    e, h, d, f, encoder, decoder = shape
    attention = 4 * e * h * d + e
    mlp = (3 if gated else 2) * e * f + e
    layers = encoder * (attention + mlp) + decoder * (2 * attention + mlp)
    return layers + 2 * e + tables * h * 32 + vocab * e * (1 if tied else 2)


@pytest.fixture(autouse=True)
def gin_search_path():
    gin.clear_config()
    gin.add_config_file_search_path(str(CONFIGS))
    yield
    gin.clear_config()


def parse(name, bindings=()):
    gin.clear_config()  # parsing locks it
    gin.parse_config_files_and_bindings([f"models/{name}.gin"], list(bindings))
    return gin.query_parameter("%MODEL").scoped_configurable_fn()


def num_parameters(model):
    # Scanned: one layer to trace instead of twenty-four.
    abstract = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract))


def test_every_file_is_tested():
    found = {path.stem for path in (CONFIGS / "models").glob("*.gin")}
    want = {f"{family}_{size}" for family in FAMILIES for size in SIZES}
    assert found == want | {"t5_1_1_tiny", *OTHERS}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_published_shapes(family, size):
    shapes, vocab, gated, tied = FAMILIES[family]
    name = f"{family}_{size}"
    model = parse(name, ["models.T5Config.scan_layers = True"])
    assert isinstance(model, models.T5)
    got = num_parameters(model)
    assert got == count(shapes[size], vocab, gated, tied)
    assert got == PUBLISHED.get(name, got)
    assert model.config.head_dim == shapes[size][2]
    path = gin.query_parameter("%VOCABULARY_PATH")
    assert path.startswith("gs://t5-data/vocabs/")
    assert ("mc4" in path) == (family == "mt5")


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes(name):
    shape, vocab, gated, tied, published = OTHERS[name]
    bindings = ["models.T5Config.scan_layers = True", "VOCABULARY_PATH = 'x'"]
    model = parse(name, bindings)
    got = num_parameters(model)
    umt5 = name.startswith("umt5")
    assert got == count(shape, vocab, gated, tied, sum(shape[4:]) if umt5 else 2)
    assert abs(got / published - 1) < 0.01
    assert model.config.head_dim == shape[2]
    first = "silu" if "ul2" in name else "gelu" if gated else "relu"
    assert model.config.mlp_activations[0] == first


def test_vocabularies_with_other_ids(tmp_path):
    foreign_folders.write_tokenizer("madlad", tmp_path / "madlad")
    parse("madlad400_3b", [f"VOCABULARY_PATH = '{tmp_path}/madlad/spiece.model'"])
    found = gin.query_parameter("%VOCABULARY").scoped_configurable_fn()
    assert (found.pad_id, found.eos_id) == (1, 2)
    foreign_folders.write_tokenizer("bpe", tmp_path / "bpe")
    parse("codet5p_220m", [f"VOCABULARY_PATH = '{tmp_path}/bpe/tokenizer.json'"])
    found = gin.query_parameter("%VOCABULARY").scoped_configurable_fn()
    assert (found.pad_id, found.eos_id, found.start_id) == (0, 2, 0)
    assert found.decode(found.encode("x = 1")) == "x = 1"


@pytest.mark.parametrize("name", ["t5_1_1_tiny", "byt5_small"])
def test_byte_models_and_their_vocabulary_agree(name):
    model = parse(name)
    vocabulary = gin.query_parameter("%VOCABULARY").scoped_configurable_fn()
    assert isinstance(vocabulary, vocabularies.ByteVocabulary)
    assert vocabulary.vocab_size == model.config.vocab_size == 384


def test_macros_reach_the_model():
    bindings = ["DROPOUT_RATE = 0.1", "ACTIVATION_DTYPE = 'bfloat16'"]
    config = parse("t5_1_1_tiny", bindings).config
    assert (config.dropout_rate, config.dtype) == (0.1, "bfloat16")
    assert config.mlp_activations == ("gelu", "linear")
    # Called a second time gin makes an equal model, which jit recognises.
    assert parse("t5_1_1_tiny", bindings) == parse("t5_1_1_tiny", bindings)
    assert parse("t5_1_1_tiny").config.dtype == "float32"
