"""Pipelines with adapters on them."""

import pytest
from adapted import FAMILIES, Tiny


@pytest.fixture(scope="session")
def sd() -> Tiny:
    return Tiny("sd")


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(request.param)
