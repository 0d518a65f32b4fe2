"""Settings that must hold before jax or TensorFlow is imported by any test."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys

import pytest

# Eight virtual devices on one CPU: sharded code runs as it does on eight chips. Tests
# compile far more than they compute, so LLVM is told not to optimise, and XLA to write
# loops by its older and simpler emitters, where it has them: an unknown flag ends the
# process. A step compiles in a third of the time.
_HAS_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * _HAS_EMITTERS
).strip()
# TensorFlow: errors only, and the same numbers on every CPU.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept in pytest's cache, also for the processes started."""
    if not config.pluginmanager.hasplugin("cacheprovider"):  # -p no:cacheprovider
        return
    folder = config.cache.mkdir("jax")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    # Tiny programs compile faster than they are looked up.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    if sys.dont_write_bytecode and sys.pycache_prefix is None:
        # Python may write no bytecode beside the sources, as in many containers. It
        # goes here instead: compiling jax alone takes each process started 3 seconds.
        sys.dont_write_bytecode = False
        sys.pycache_prefix = str(config.cache.mkdir("bytecode"))
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(autouse=True)
def clear_gin():
    """No test sees another's gin configuration."""
    yield
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config()


# What imports TensorFlow is one group: one process imports it.
_TOGETHER = {
    "tensorflow": (
        *("prepare/test_seqio_tasks.py", "prepare/test_sources.py"),
        *("evaluation/test_metrics.py", "tests/test_vocabularies.py"),
    ),
}
_LONG = (
    *("test_train.py", "test_equivalences.py", "test_cli.py", "test_generation.py"),
    *("test_generate.py", "test_engine.py", "test_smc.py", "test_beam.py"),
    "test_iterate.py",
)


def _file(node: str) -> str:
    """The group that a test's id belongs to: its file, or what files are together."""
    path = node.split("::")[0]
    own = (n for n, ends in _TOGETHER.items() if path.endswith(ends))
    return next(own, path)


def _group(item: pytest.Item) -> str:
    """What shares compiled programs: a file; of the equivalences, an objective."""
    parameters = getattr(item, "callspec", None)
    found = {} if parameters is None else parameters.params
    case = found.get("case")
    own = item.path.name == "test_equivalences.py" and case
    return f"{item.path}:{case[0]}" if own else _file(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a group follow each other, the files that take longest first.

    A long file that came last would leave the other processes without work.
    """
    order: dict[str, int] = {}

    def place(item: pytest.Item) -> tuple[int, int]:
        name = item.path.name
        first = _LONG.index(name) if name in _LONG else len(_LONG)
        return first, order.setdefault(_group(item), len(order))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """``-n`` alone gives a process whole groups, in their order.

    Fixtures and compiled functions are then made once, not by each process.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _file(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


def _mappings() -> int:
    """Mappings of memory that this process has; 0 where the system does not tell."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees compiled programs before there are too many.

    A program is several mappings of memory, of which a process may have 65530; past
    them the compiler aborts, and takes the process with it.
    """
    if nextitem is not None and _group(nextitem) == _group(item):
        return
    if "jax" in sys.modules and _mappings() > 20_000:
        sys.modules["jax"].clear_caches()
        gc.collect()
