"""Every objective, as a fixture."""

from __future__ import annotations

import pytest
from objectives_cases import Case, get_case

from jaxalign import objectives


@pytest.fixture(params=sorted(objectives.OBJECTIVES))
def case(request) -> Case:
    return get_case(request.param)
