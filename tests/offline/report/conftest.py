"""Reports here have their plots."""

import pytest


@pytest.fixture(autouse=True)
def plots() -> None:
    """In place of the fixture that leaves them out."""
