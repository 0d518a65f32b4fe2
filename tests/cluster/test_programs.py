"""Compiled programs are kept for the next process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxalign.cluster import programs

SLOW_TO_COMPILE = """
import sys
from jaxalign.cluster import programs
if "late" in sys.argv:
    import jax
programs.keep()
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: jnp.linalg.svd(x @ x.T))(jnp.ones((30, 30)))
print(sum("cache_hits" in name for name in hits), jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_second_process_finds_them(when, tmp_path):
    env = {n: v for n, v in os.environ.items() if n not in (programs.FOLDER,)}
    env |= {"HOME": str(tmp_path), programs._LEAST: "0"}
    argv = [sys.executable, "-c", SLOW_TO_COMPILE, when]
    told = [
        subprocess.run(argv, env=env, check=True, capture_output=True, text=True)
        for _ in range(2)
    ]
    (first, folder), (second, _) = (x.stdout.split() for x in told)
    assert int(first) == 0 < int(second)
    assert Path(folder).parent == tmp_path / ".cache" / "jaxalign" / "compiled"
    assert len(list(Path(folder).glob("*-cache"))) >= 1


@pytest.mark.parametrize("value", ["", "/elsewhere"])
def test_what_is_set_stays(value, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv(programs.FOLDER, value)
    programs.keep()
    assert os.environ[programs.FOLDER] == value
    assert jax.config.jax_compilation_cache_dir == before


def test_one_of_a_program_of_its_own_stays(monkeypatch):
    monkeypatch.delenv(programs.FOLDER, raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", "/mine")
    try:
        programs.keep()
        assert programs.FOLDER not in os.environ
        assert jax.config.jax_compilation_cache_dir == "/mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
