"""Whether this machine multiplies bfloat16 fast."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import jax

_log = logging.getLogger(__name__)

# As /proc/cpuinfo spells them: of x86, and of ARM.
_UNITS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# What XLA may be kept to, the oldest first; only the last ones have the unit.
_WITHOUT = ("SSE4_2", "AVX", "AVX2", "AVX512", "AVX512_VNNI")
_warned = False


def flags() -> frozenset[str]:
    """What the processor can do, in Linux's words; empty where it does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def lacks_bfloat16() -> bool:
    """Whether bfloat16 is computed here by a processor without a unit for it.

    False on accelerators, and where the processor does not tell. ``XLA_FLAGS`` may keep
    XLA from a unit that is there.
    """
    if jax.default_backend() != "cpu":
        return False
    kept = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if kept and kept[-1].upper() in _WITHOUT:
        return True
    found = flags()
    return bool(found) and not found & _UNITS


def warn_of_bfloat16(dtype: str) -> None:
    """Says once that float32 is the better choice, where it is.

    Args:
      dtype: of the activations that are asked for.
    """
    global _warned
    if dtype != "bfloat16" or _warned or not lacks_bfloat16():
        return
    _warned = True
    _log.warning(
        "bfloat16 on a processor without a unit for it (AVX512-BF16 or AMX): it is "
        "emulated here, and rounds. float32 is recommended: ACTIVATION_DTYPE = "
        "'float32'; see docs/performance.md."
    )
