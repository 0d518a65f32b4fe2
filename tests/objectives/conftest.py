"""Every objective, as a fixture."""

from __future__ import annotations

import pytest
from objectives_cases import BagOfTokens, Case, get_case

from jaxalign import models, objectives

# Compiling T5 for each of many objectives takes longer than anything else the tests do.
# By default one objective of each kind goes through everything on T5: one pass and a
# loss per pair, two networks, statistics of the whole batch. The others go through it
# on a network that compiles at once, and on T5 among the slow tests.
_FIRST = ("DPO", "DROV", "KTO")
_OTHERS = sorted(set(objectives.OBJECTIVES) - set(_FIRST))
_ON_T5 = [
    *(pytest.param((n, models.T5), id=n) for n in _FIRST),
    *(pytest.param((n, models.T5), id=n, marks=pytest.mark.slow) for n in _OTHERS),
]
_ON_BAG = [pytest.param((n, BagOfTokens), id=f"{n}-bag") for n in _OTHERS]


@pytest.fixture(params=_ON_T5 + _ON_BAG)
def case(request) -> Case:
    """Every objective, be it on a stand-in network."""
    return get_case(*request.param)


@pytest.fixture(params=_ON_T5)
def t5_case(request) -> Case:
    """Every objective on T5, for what the network and the compiler may get wrong."""
    return get_case(*request.param)
