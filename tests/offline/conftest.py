"""A tiny random model with a tokenizer, and text for it, made once per test session."""

from pathlib import Path

import pytest

from permllm_offline.forecast import duration
from permllm_offline.report import page
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama


@pytest.fixture(autouse=True)
def plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report has any, but in `report/`: drawing takes longer than to prune a tiny model."""
    monkeypatch.setattr(page, "_plots", lambda report: [])


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is timed in place of as many as fill a tenth of a second, with every prune."""
    monkeypatch.setattr(duration, "TIMED_SECONDS", 0)


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "calibration.txt"
    file.write_text(random_text(2000, seed=1), encoding="utf-8")
    return file
