"""Every objective, as a fixture."""

from __future__ import annotations

import pytest
from objectives_cases import BagOfTokens, Case, get_case, structures

from jaxalign import models, objectives

# Compiling T5 for each of many objectives takes longer than anything else the tests do.
# One objective of each structure goes through everything on T5 by default. The others
# go through what concerns their own code on a network that compiles at once, and
# through everything on T5 among the slow tests.
_FIRST = sorted(structures())
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
