"""Every objective, as a fixture."""

from __future__ import annotations

import pytest
from objectives_cases import BagOfTokens, Case, get_case

from jaxalign import models, objectives

# Compiling T5 for each of many objectives takes longer than anything else the tests do.
# By default one objective goes through everything on T5, and all of them through all of
# it at once on a network that compiles at once; one thing at a time, and on T5, all go
# through it among the slow tests.
_FIRST = ("DPO",)
_OTHERS = sorted(set(objectives.OBJECTIVES) - set(_FIRST))
_ON_T5 = [
    *(pytest.param((n, models.T5), id=n) for n in _FIRST),
    *(pytest.param((n, models.T5), id=n, marks=pytest.mark.slow) for n in _OTHERS),
]


@pytest.fixture(params=_ON_T5)
def case(request) -> Case:
    """Every objective on T5."""
    return get_case(*request.param)


@pytest.fixture(params=sorted(objectives.OBJECTIVES))
def light_case(request) -> Case:
    """Every objective on a stand-in for T5."""
    return get_case(request.param, BagOfTokens)
