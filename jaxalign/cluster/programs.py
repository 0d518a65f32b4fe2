"""Compiled programs outlive their process: a second start compiles nothing.

They lie in JAX's persistent compilation cache, ``~/.cache/jaxalign/compiled`` unless
``JAX_COMPILATION_CACHE_DIR`` names another folder, or none with an empty value.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

FOLDER, LEAST_SECONDS = "JAX_COMPILATION_CACHE_DIR", 0.3
_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep() -> None:
    """Keeps the programs of this process, and of those that it starts.

    Costs nothing before JAX is imported; what somebody has set up stays.
    """
    if FOLDER in os.environ:
        return
    here = sys.modules.get("jax")
    if here is not None and here.config.jax_compilation_cache_dir:
        return
    folder = str(Path("~/.cache/jaxalign/compiled").expanduser() / _processor())
    os.environ[FOLDER] = folder
    # What compiles faster is hardly faster looked up.
    os.environ.setdefault(_LEAST, str(LEAST_SECONDS))
    if here is not None:  # which has read the environment
        here.config.update(FOLDER.lower(), folder)
        here.config.update(_LEAST.lower(), float(os.environ[_LEAST]))


def _processor() -> str:
    """Of one home on several machines, those share programs that can run them.

    A CPU's program uses the instructions that it was compiled with, and JAX does not
    tell processors apart.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = ("flags", "Features", "model name")
    told = sorted({line for line in lines if line.startswith(names)})
    text = "\n".join([platform.machine(), platform.processor(), *told])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
