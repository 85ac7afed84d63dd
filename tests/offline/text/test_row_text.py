import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from permllm_offline.api import evaluate
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import open_source
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.text import windows
from permllm_offline.text.documents import documents
from permllm_offline.text.evaluation import evaluation_windows
from permllm_offline.text.row_text import RowText
from permllm_offline.text.windows import sample_windows, token_windows
from tests.offline.text.beginning import Beginning
from tests.offline.tiny_models import random_text

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}."
TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]


def templated(directory: Path, template: str = TEMPLATE) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(directory, bos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def written(folder: Path, *rows: object) -> str:
    file = folder / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


def texts(dataset: str, field: str, tokenizer: Any = None) -> list[str]:
    return list(documents(dataset, rows=RowText(field, tokenizer)))


def test_another_field_holds_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a", "body": "b"}, {"text": "c", "body": "d"}]
    assert texts(written(tmp_path, *rows), "body") == ["b", "d"]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    assert texts("someone/corpus", "body") == ["b", "d"]
    with pytest.raises(OfflineError, match=r'field "prose" \(found: text, body\).*--text-field'):
        texts("someone/corpus", "prose")


def test_of_parquet_only_the_field_is_read(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"more": [1], "body": ["b"], "messages": [TALK]}), file)
    asked: list[object] = []
    whole = pq.ParquetFile.iter_batches

    def iter_batches(self: Any, rows: int, columns: object) -> Iterator[Any]:
        asked.append(columns)
        assert rows < 1000  # else a file of books is in memory as a whole
        return whole(self, rows, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert texts(str(file), "body") == ["b"]
    assert texts(str(file), "text", templated(tiny_model_directory)) == [
        "</s><user>w1<assistant>w2 w3."
    ]
    assert asked == [["body"], ["messages"]]


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"messages": TALK}, "text", "</s><user>w1<assistant>w2 w3."),
        ({"messages": TALK, "prompt": "w9"}, "messages", "</s><user>w1<assistant>w2 w3."),
        ({"messages": TALK, "text": "w9"}, "text", "w9"),
        ({"messages": TALK, "chosen": TALK[:1]}, "chosen", "</s><user>w1."),
        ({"messages": []}, "text", ""),
        ({"text": None, "id": "1"}, "text", ""),
        ({"conversations": TALK, "id": "1"}, "text", "</s><user>w1<assistant>w2 w3."),
        ({"conversations": TALK[:1], "messages": TALK}, "text", "</s><user>w1<assistant>w2 w3."),
        (
            {
                "conversations": [
                    {"from": role, "value": value, "weight": None}
                    for role, value in (("system", "w0"), ("human", "w1"), ("gpt", "w2 w3"))
                ]
            },
            "text",
            "</s><system>w0<user>w1<assistant>w2 w3.",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}
                ]
            },
            "text",
            "</s><user>ab.",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            "text",
            "</s><assistant>.",
        ),
    ],
)
def test_messages_go_through_the_chat_template(
    row: object, field: str, expected: str, tmp_path: Path, tiny_model_directory: Path
) -> None:
    assert texts(written(tmp_path, row), field, templated(tiny_model_directory)) == [expected]


def test_null_entries_of_a_message_are_left_out(tmp_path: Path, tiny_model_directory: Path) -> None:
    """Hub data sets fill keys that other messages have; templates ask whether they are there."""
    template = "{% for m in messages %}{{ m | list | length }}{% endfor %}"
    row = {"messages": [TALK[0] | {"name": None}, TALK[1] | {"name": "w9"}]}
    assert texts(written(tmp_path, row), "text", templated(tiny_model_directory, template)) == [
        "23"
    ]


def test_a_template_that_writes_the_date_gives_the_same_every_day(
    tmp_path: Path, tiny_model_directory: Path
) -> None:
    asked = "%d %B %Y, %-d %b %y, %A, 100%%"
    template = f"\n{{{{ strftime_now('{asked}') if strftime_now is defined }}}}"
    tokenizer = templated(tiny_model_directory, template)
    assert texts(written(tmp_path, {"messages": TALK}), "text", tokenizer) == [
        "\n01 January 2026, 1 Jan 26, Thursday, 100%"
    ]


class Chatting(Beginning):
    """A tokenizer whose chat template writes the token that windows begin with."""

    chat_template = "any"
    bos_token = chr(7)

    def apply_chat_template(self, messages: Any, **_: object) -> str:
        return self.bos_token + "".join(message["content"] for message in messages)


def test_no_window_begins_with_two_tokens_for_the_beginning(tmp_path: Path) -> None:
    """Of a model whose windows begin with it; others have what the template writes, once."""
    dataset = written(tmp_path, {"messages": [{"role": "user", "content": "abcd"}]})
    tokenizer = Chatting()
    found = token_windows(documents(dataset, rows=RowText("text", tokenizer)), tokenizer, 5, None)
    assert found.tolist() == [[7, *map(ord, "abcd")]]
    tokenizer.window_begin = None  # type: ignore[assignment]
    found = token_windows(documents(dataset, rows=RowText("text", tokenizer)), tokenizer, 5, None)
    assert found.tolist() == [[7, *map(ord, "abcd")]]


def test_conversations_are_written_no_further_than_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stream(*_: object, **__: object) -> Iterator[object]:
        yield from ({"messages": [{"role": "user", "content": "abcd"}]} for _ in range(3))
        raise AssertionError("read too far")

    monkeypatch.setattr("datasets.load_dataset", stream)
    monkeypatch.setattr(windows, "MAX_TOKENS", 10)
    size = {"num_samples": 2, "sequence_length": 5, "seed": 0}
    found = sample_windows(["a/b"], Chatting(), text_field="messages", **size)
    assert found.calibration.shape == (2, 5)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["w1"], r'message without a "role".* \(found: str\)'),
        ([{"speaker": "human", "text": "w1"}], r'without a "role".*\(found: speaker, text\)'),
        ([{"from": "human", "value": None}], r'without a "role".*\(found: from, value\)'),
        ([{"from": None, "value": "w1"}], r'without a "role".*\(found: from, value\)'),
        ([{"role": "user", "content": None}], r'a "content" of text'),
        ([{"role": "user", "content": [{"type": "image"}]}], r'a "content" of text'),
        ([{"role": "system", "content": "w1"}], r"template .* refuses a row of .*no system role"),
    ],
)
def test_messages_that_no_template_takes_are_refused(
    messages: object, message: str, tmp_path: Path, tiny_model_directory: Path
) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    tokenizer = templated(tiny_model_directory, template + "{% endif %}")
    with pytest.raises(OfflineError, match=message):
        texts(written(tmp_path, {"messages": messages}), "text", tokenizer)


def test_without_a_chat_template_messages_are_refused(
    tmp_path: Path, tiny_model_directory: Path
) -> None:
    tokenizer = load_tokenizer(open_source(str(tiny_model_directory)))
    with pytest.raises(OfflineError, match="tokenizer of the model has no chat template"):
        texts(written(tmp_path, {"messages": TALK}), "text", tokenizer)


def test_prune_and_eval_read_the_field(tmp_path: Path, tiny_model_directory: Path) -> None:
    text, other = random_text(200, seed=1), random_text(200, seed=2)
    dataset = written(tmp_path, {"body": text, "text": other})
    entries = {"model": str(tiny_model_directory), "method": "wanda", "dataset": dataset}
    entries |= {"num_samples": 6, "sequence_length": 24, "evaluation_windows": 0}
    expected = torch.tensor([int(word[1:]) + 2 for word in text.split()][: 8 * 24]).reshape(8, 24)
    windows = prepare(make_recipe(entries | {"text_field": "body"})).windows
    assert windows is not None
    found = {tuple(window) for window in windows.calibration.tolist()}
    assert found < {tuple(window) for window in expected.tolist()}

    tokenizer = load_tokenizer(open_source(str(tiny_model_directory)))
    cut = evaluation_windows(dataset, tokenizer, 24, None, text_field="body")
    assert torch.equal(cut, expected)
    (tmp_path / "body.txt").write_text(text, encoding="utf-8")
    plain = evaluate(tiny_model_directory, tmp_path / "body.txt", sequence_length=24)
    named = evaluate(tiny_model_directory, dataset, sequence_length=24, text_field="body")
    assert named == plain
    assert named != evaluate(tiny_model_directory, dataset, sequence_length=24)
