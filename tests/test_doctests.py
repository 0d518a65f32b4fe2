"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import jaxalign

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(jaxalign.__path__, "jaxalign.")
    # These two are other people's to import: data sets and gin files.
    if not module.name.startswith(("jaxalign.tasks", "jaxalign.gin_configs"))
)


def test_there_are_modules():
    assert "jaxalign.losses.pairwise" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
