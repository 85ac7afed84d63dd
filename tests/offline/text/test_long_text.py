"""Documents that are too long to be tokenized at once, or too few to draw windows from."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from permllm_offline.text import windows
from permllm_offline.text.windows import document_windows, sample_windows, token_windows
from tests.offline.text.beginning import Beginning


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["abc"]),
        ("ab\ncdef\ngh", ["ab\n", "cdef\n", "gh"]),
        ("ab\n\ncdef", ["ab\n\n", "cdef"]),
        ("abcdefghijklm", ["abcdef", "ghijkl", "m"]),
        ("abcde\n", ["abcde\n"]),
    ],
)
def test_long_documents_are_tokenized_in_pieces(
    text: str, pieces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "PIECE_CHARACTERS", 6)
    assert list(windows._pieces(text)) == pieces
    tokenizer = Beginning()
    token_windows([text], tokenizer, 2, 100)
    assert tokenizer.tokenized == f"{text}\n\n"


def test_a_document_beyond_the_limit_is_tokenized_no_further(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(windows, "PIECE_CHARACTERS", 6)
    monkeypatch.setattr(windows, "MAX_TOKENS", 10)
    for cut in (
        lambda tokenizer: token_windows(["abcde\n" * 9], tokenizer, 4, None),
        lambda tokenizer: document_windows(["abcde\n" * 9], tokenizer, 4, 1, seed=0),
    ):
        caplog.clear()
        tokenizer = Beginning()
        cut(tokenizer)
        assert tokenizer.tokenized == "abcde\n" * 2
        assert "only the first 10 tokens" in caplog.text


def test_as_many_windows_as_are_asked_for_come_from_one_document(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(windows, "PIECE_CHARACTERS", 6)
    monkeypatch.setattr(windows, "MAX_TOKENS", 10)
    assert token_windows(["abcde\n" * 9], Beginning(), 4, 12).shape == (12, 4)
    assert not caplog.text


def test_windows_of_few_documents_are_warned_of(
    tmp_path: Path, tiny_model_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    file = tmp_path / "x.jsonl"
    options = {"num_samples": 8, "sequence_length": 4, "seed": 0, "sampling": "document"}
    for documents_there, warned in ((1, True), (1000, False)):
        lines = [json.dumps({"text": f"w{i % 20} " * 6}) for i in range(documents_there)]
        file.write_text("\n".join(lines), encoding="utf-8")
        caplog.clear()
        sample_windows([str(file)], tokenizer, **options)
        assert ("8 windows of data set" in caplog.text) == warned
        assert ("are from 1 of its documents" in caplog.text) == warned
