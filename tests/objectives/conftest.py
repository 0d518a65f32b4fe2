"""Every objective, as a fixture."""

from __future__ import annotations

import pytest
from objectives_cases import Case

from jaxalign import objectives


@pytest.fixture(params=sorted(objectives.OBJECTIVES))
def case(request) -> Case:
    return Case(request.param)
