import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from permllm_offline.api import evaluate
from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.text import evaluation
from permllm_offline.text.evaluation import evaluation_windows, perplexity
from permllm_offline.text.paper_protocol import paper_name
from tests.offline.text.beginning import Beginning
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama

ROWS = ["", " = T = \n", "", "ab c\n", "d" * 40, ""]


class Letters:
    """A tokenizer by letters, which begins a text with a token where it may."""

    def __call__(self, text: str, add_special_tokens: bool, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [63] * add_special_tokens + [ord(letter) % 60 for letter in text]}


def copy_of(name: str, folder: Path, rows: list[str]) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    return str(file)


def test_perplexity_is_that_of_a_plain_loop_over_the_joined_rows(tmp_path: Path) -> None:
    """As papers compute it: each window's mean loss times its length, over all lengths."""
    model: Any = tiny_llama()
    stream = torch.tensor([63] + [ord(letter) % 60 for letter in "\n\n".join(ROWS)])
    length, losses = 11, []
    count = len(stream) // length
    for index in range(count):
        window = stream[None, index * length : (index + 1) * length]
        with torch.no_grad():
            logits = model(window).logits[0, :-1]
        loss = torch.nn.CrossEntropyLoss()(logits, window[0, 1:])
        losses.append(loss * length)
    expected = math.exp(sum(losses) / (count * length))

    dataset = copy_of("wikitext2", tmp_path, ROWS)
    windows = evaluation_windows(dataset, Letters(), length, None, protocol="paper")
    assert len(windows) == count == 5
    assert perplexity(model, windows) == pytest.approx(expected, rel=1e-5)
    rows = perplexity(model, evaluation_windows(dataset, Letters(), length, None))
    assert rows != pytest.approx(expected, rel=1e-3)


def test_windows_begin_with_the_token_that_the_model_needs_and_no_other(tmp_path: Path) -> None:
    class Both(Beginning):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> Any:
            found = super().__call__(text)["input_ids"]
            return {"input_ids": [7, *found] if add_special_tokens else found}

    dataset = copy_of("wikitext2", tmp_path, ["ab", "cd"])
    windows = evaluation_windows(dataset, Both(), 4, None, protocol="paper")
    assert windows.tolist() == [[7, *map(ord, "ab\n")], [7, *map(ord, "\ncd")]]


def test_c4_is_the_beginning_of_its_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        assert (name, config, split, streaming) == ("allenai/c4", "en", "validation", True)
        yield from ({"text": chr(40 + row % 20)} for row in range(1100))
        raise AssertionError("read too far")

    monkeypatch.setattr("datasets.load_dataset", load)
    joined = " ".join(chr(40 + row % 20) for row in range(1100))
    tokens = [63] + [ord(letter) % 60 for letter in joined]
    windows = evaluation_windows("c4", Letters(), 100, None, protocol="paper")
    assert windows.flatten().tolist() == tokens[:2200]
    assert len(evaluation_windows("c4", Letters(), 8, None, protocol="paper")) == 256


def test_fewer_windows_are_no_published_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = copy_of("wikitext2", tmp_path, ROWS)
    evaluation_windows(dataset, Letters(), 11, 5, protocol="paper")
    assert not caplog.text
    assert len(evaluation_windows(dataset, Letters(), 11, 2, protocol="paper")) == 2
    assert "papers measure all 5 windows of" in caplog.text


def test_data_sets_of_papers_are_known_by_every_name(tmp_path: Path) -> None:
    names = ("wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1", "allenai/c4:en:validation")
    assert [paper_name(name) for name in names] == ["wikitext2", "wikitext2", "c4"]
    assert paper_name("Salesforce/wikitext:wikitext-2-raw-v1:train") is None
    assert [paper_name(name) for name in ("pile", "allenai/c4:en:train")] == [None, None]
    (tmp_path / "c4").mkdir()
    copies = copy_of("wikitext2.test", tmp_path, []), str(tmp_path / "c4")
    assert [paper_name(name) for name in copies] == ["wikitext2", "c4"]


def test_a_reading_that_no_paper_has_is_refused(text_file: Path) -> None:
    with pytest.raises(OfflineError, match=r"not known: --protocol paper takes wikitext2, c4, or"):
        evaluation_windows(str(text_file), Letters(), 8, None, protocol="paper")


def test_rows_of_such_a_data_set_are_warned_of(
    tmp_path: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation_windows(str(text_file), Letters(), 8, 1)
    assert not caplog.text
    evaluation_windows(copy_of("wikitext2", tmp_path, ROWS), Letters(), 8, 1)
    assert "read row by row, in windows of 8 tokens" in caplog.text
    assert "--protocol paper" in caplog.text


def test_very_many_windows_are_told_before_the_work(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    characters = len(text_file.read_text(encoding="utf-8")) + 2
    monkeypatch.setattr(evaluation, "MANY_WINDOWS", characters // 8)
    evaluation_windows(str(text_file), Letters(), 9, None)
    evaluation_windows(str(text_file), Letters(), 8, characters // 8)
    assert not caplog.text
    evaluation_windows(str(text_file), Letters(), 8, None)
    assert f"measured on {characters // 8:,} windows of 8 tokens" in caplog.text
    assert "--max-windows N takes the first N" in caplog.text


def test_the_command_reads_as_papers_do_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    tiny_llama(max_position_embeddings=2048).save_pretrained(model)
    save_tokenizer(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    tokenizer.save_pretrained(model)
    dataset = copy_of("wikitext2", tmp_path, [random_text(599, seed=n) for n in range(5)])
    assert main(["eval", str(model), "--dataset", dataset, "--protocol", "paper"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["protocol"], result["sequence_length"], result["windows"]) == ("paper", 2048, 1)
    shorter = evaluate(model, dataset, protocol="paper", sequence_length=107)
    assert (shorter.protocol, shorter.windows) == (
        "paper",
        28,
    )  # 5 x 599 tokens and one for the beginning
    assert evaluate(model, dataset, max_windows=1).sequence_length == 512


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"protocol": "paper"}, "--protocol paper is about perplexity"),
        ({"text_field": "body"}, "--text-field body is about perplexity"),
        ({"max_windows": 2}, "--max-windows 2 is about perplexity"),
        ({"sequence_length": 9}, "--sequence-length 9 is about perplexity"),
        ({"protocol": "papers"}, "protocol 'papers' is not known: give rows or paper"),
    ],
)
def test_options_of_the_text_want_one(option: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=named):
        evaluate(tmp_path, tasks="arc_easy", **option)
