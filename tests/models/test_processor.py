"""The warning where bfloat16 is asked of a processor without a unit for it."""

import logging

import pytest

from jaxalign import models
from jaxalign.models import processor

AMX = frozenset({"avx2", "avx512_bf16", "amx_bf16"})
AVX2 = frozenset({"avx", "avx2", "fma"})


@pytest.fixture
def on(monkeypatch):
    """Makes this machine a processor with some flags, and nothing said yet."""

    def on(flags, kept=""):
        monkeypatch.setattr(processor, "flags", lambda: flags)
        monkeypatch.setattr(processor, "_warned", False)
        monkeypatch.setenv("XLA_FLAGS", kept)

    return on


@pytest.mark.parametrize(
    ("flags", "kept", "lacks"),
    [
        (AVX2, "", True),
        (AMX, "", False),
        (frozenset({"avx512_bf16"}), "", False),
        (frozenset({"asimd", "bf16"}), "", False),  # ARM
        (frozenset(), "", False),  # it does not tell
        (AMX, "--xla_cpu_max_isa=AVX2", True),
        (AMX, "--xla_a=1 --xla_cpu_max_isa=avx512 --xla_b=2", True),
        (AMX, "--xla_cpu_max_isa=AMX", False),
        (AVX2, "--xla_cpu_max_isa=AMX", True),
    ],
)
def test_which_processors_lack_the_unit(on, flags, kept, lacks):
    on(flags, kept)
    assert processor.lacks_bfloat16() is lacks


def test_accelerators_have_it(on, monkeypatch):
    on(AVX2)
    monkeypatch.setattr(processor.jax, "default_backend", lambda: "tpu")
    assert not processor.lacks_bfloat16()


@pytest.mark.parametrize("word", ["flags", "Features"])
def test_flags_are_read_as_linux_spells_them(word, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{word}\t\t: fpu avx2 amx_bf16\nbugs\t: spectre\n")
    monkeypatch.setattr(processor, "Path", lambda name: path)
    assert processor.flags() == {"fpu", "avx2", "amx_bf16"}
    path.unlink()
    assert processor.flags() == frozenset()


def description(dtype):
    config = models.T5Config(64, 16, 2, 8, 32, 1, 1, dtype=dtype)
    return models.stored(models.T5(config))


def test_a_stored_network_in_bfloat16_warns_once_and_recommends_float32(on, caplog):
    on(AVX2)
    with caplog.at_level(logging.WARNING):
        models.restored(description("float32"))
        assert not caplog.records
        for _ in range(2):
            models.restored(description("bfloat16"))
    (record,) = caplog.records
    assert "ACTIVATION_DTYPE = 'float32'" in record.message


def test_a_processor_with_the_unit_is_not_warned_of(on, caplog):
    on(AMX)
    with caplog.at_level(logging.WARNING):
        models.restored(description("bfloat16"))
    assert not caplog.records
