"""A tiny dense model, saved once; a key-value head feeds two query heads of one block each."""

from pathlib import Path

import pytest

from tests.conversion.sparse_models import save_dense


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("conversion") / "dense")
