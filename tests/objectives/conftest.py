"""Every objective, as a fixture."""

from __future__ import annotations

import pytest
from objectives_cases import BagOfTokens, Case, get_case

from jaxalign import models, objectives

# Compiling T5 for each of many objectives takes longer than anything else the tests do.
# By default one objective of each kind goes through everything on T5: one pass and a
# loss per pair, two networks, statistics of the whole batch. The others go through all
# of it at once on a network that compiles at once; one thing at a time, and on T5, they
# go through it among the slow tests.
_FIRST = ("DPO", "DROV", "KTO")
_OTHERS = sorted(set(objectives.OBJECTIVES) - set(_FIRST))
_ON_T5 = [
    *(pytest.param((n, models.T5), id=n) for n in _FIRST),
    *(pytest.param((n, models.T5), id=n, marks=pytest.mark.slow) for n in _OTHERS),
]


@pytest.fixture(params=_ON_T5)
def case(request) -> Case:
    """Every objective on T5."""
    return get_case(*request.param)


@pytest.fixture(params=[pytest.param((n, BagOfTokens), id=n) for n in _OTHERS])
def light_case(request) -> Case:
    """Every other objective on a stand-in for T5."""
    return get_case(*request.param)
