import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import open_source
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.text import windows
from permllm_offline.text.documents import MAX_CHARACTERS, SUFFIXES, documents
from permllm_offline.text.windows import (
    check_datasets,
    document_windows,
    sample_windows,
    token_windows,
)
from tests.offline.text.beginning import Beginning


def test_reads_text_json_lines_parquet_and_folders(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    lines = [json.dumps({"text": "second"}), "", json.dumps({"text": "third", "id": 3})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(pa.table({"text": ["fourth"]}), tmp_path / "c.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert list(documents(str(tmp_path))) == ["first", "second", "third", "fourth"]
    assert list(documents(str(tmp_path / "c.parquet"))) == ["fourth"]
    beside = pa.table({"text": ["fifth"], "more": pa.array([1], type=pa.int32())})
    pq.write_table(beside, tmp_path / "d.parquet")
    assert list(documents(str(tmp_path / "d.parquet"))) == ["fifth"]
    (tmp_path / "d.parquet").unlink()


def test_folders_may_be_named_like_files(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.jsonl" / "part-0.jsonl").write_text('{"text": "first"}', encoding="utf-8")
    assert list(documents(str(tmp_path))) == ["first"]
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OfflineError, match=r"cannot read .*lost\.txt"):
        list(documents(str(tmp_path)))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_json_lines_end_at_newlines_alone(tmp_path: Path, newline: str) -> None:
    texts = ["a\u2028b", "c\u2029d", "e\x85f"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "x.jsonl").write_bytes(newline.join([*lines, ""]).encode())
    assert list(documents(str(tmp_path / "x.jsonl"))) == texts


def test_json_lines_are_read_one_by_one(tmp_path: Path) -> None:
    """What is far behind is not even decoded: data sets may be larger than memory."""
    file = tmp_path / "x.jsonl"
    line = json.dumps({"text": "a" * 10_000}).encode() + b"\n"
    file.write_bytes(100 * line + b"\xff is no UTF-8")
    assert list(islice(documents(str(file)), 50)) == 50 * ["a" * 10_000]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "x.jsonl").write_bytes(mark + b'{"text": "first"}')
    (tmp_path / "x.txt").write_bytes(mark + b"second")
    assert list(documents(str(tmp_path))) == ["first", "second"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"w1 \ud83d w3", "w1 \ufffd w3"),
        (r"w1 \ude00", "w1 \ufffd"),
        (r"w1\ud83d", "w1\ufffd"),
        (r"\ud83d\ude00 \ufeff", "\U0001f600 \ufeff"),
    ],
)
def test_surrogates_without_a_partner_are_replaced(
    written: str, read: str, tmp_path: Path, tiny_model_directory: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "{written}"}}', encoding="utf-8")
    texts = list(documents(str(tmp_path / "x.jsonl")))
    assert texts == [read]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    assert len(token_windows(texts, tokenizer, 1, None)) == len(read.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{oops', "line 2: not JSON"),
        ("x.jsonl", b'{"body": "a"}', 'without a string field "text" .found: body'),
        ("x.txt", b"\xff\xfe\x00", "cannot read"),
        ("x.jsonl", b'{"text": "a"}\n\xff\xfe', "cannot read"),
        ("x.parquet", b"nothing", r"as parquet: .*\. Fetch or write the file again"),
    ],
)
def test_bad_files_say_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OfflineError, match=message):
        list(documents(str(tmp_path / name)))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="holds no text"):
        list(documents(str(tmp_path)))


def test_an_unreachable_hub_name_suggests_local_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(OfflineError, match=r"ConnectionError: no route\).*local \.txt") as caught:
        list(documents("someone/corpus"))
    assert all(suffix in str(caught.value) for suffix in (*SUFFIXES, ".gz"))


def test_hub_names_may_carry_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return [{"text": "hello"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(documents("a/b:c:validation")) == ["hello"]
    list(documents("a/b", split="test"))
    assert asked == [("a/b", "c", "validation", True), ("a/b", None, "test", True)]


def test_short_names_stand_for_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"text": "hello"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    list(documents("c4"))
    list(documents("c4", split="test"))
    list(documents("pile"))
    list(documents("wikitext2"))
    list(documents("wikitext2", split="test"))
    assert asked == [
        ("allenai/c4", "en", "train"),
        ("allenai/c4", "en", "validation"),
        ("monology/pile-uncopyrighted", None, "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ]


def test_a_file_wins_over_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c4").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert list(documents("c4")) == ["mine"]


def test_document_windows_lie_inside_one_document(tiny_model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    texts = ["w0 w1 w2 w3 w4 w5 w6 w7", "w9", "w20 w21 w22 w23 w24"]
    windows, origin = document_windows(texts, tokenizer, 4, 40, seed=0)
    assert windows.shape == (40, 4)
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()
    starts = {document: set(windows[origin == document, 0].tolist()) for document in (0, 1)}
    assert starts == {0: {2, 3, 4, 5, 6}, 1: {22, 23}}


def test_held_out_windows_are_of_other_documents(
    tmp_path: Path, tiny_model_directory: Path
) -> None:
    lines = [json.dumps({"text": f"w{i} " * 6}) for i in range(12)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines), encoding="utf-8")
    drawn = sample_windows(
        [str(tmp_path / "many.jsonl")],
        AutoTokenizer.from_pretrained(tiny_model_directory),
        num_samples=6,
        sequence_length=4,
        seed=0,
        num_held_out=30,
        sampling="document",
    )
    assert len(drawn.calibration) == 6
    assert len(drawn.held_out) > 0
    assert not set(drawn.calibration.flatten().tolist()) & set(drawn.held_out.flatten().tolist())


def test_documents_that_are_all_short_are_refused(
    text_file: Path, tiny_model_directory: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    options = {"num_samples": 1, "sequence_length": 5000, "seed": 0, "sampling": "document"}
    with pytest.raises(OfflineError, match=r"no document of more than 5000 tokens.*stream"):
        sample_windows([str(text_file)], tokenizer, **options)


def test_sources_share_the_windows(tmp_path: Path, tiny_model_directory: Path) -> None:
    for name, word in (("a", "w1"), ("b", "w2")):
        (tmp_path / f"{name}.txt").write_text(f"{word} " * 200, encoding="utf-8")
    drawn = sample_windows(
        [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
        AutoTokenizer.from_pretrained(tiny_model_directory),
        num_samples=5,
        sequence_length=8,
        seed=0,
        num_held_out=4,
    )
    assert sorted(drawn.calibration[:, 0].tolist()) == [3, 3, 3, 4, 4]
    assert sorted(drawn.held_out[:, 0].tolist()) == [3, 3, 4, 4]


def test_every_data_set_has_a_share_of_the_windows(text_file: Path) -> None:
    check_datasets([str(text_file), "c4"], 2)
    with pytest.raises(OfflineError, match=r"^1 calibration windows .* 2 data .*--num-samples 2 "):
        check_datasets([str(text_file), "c4"], 1)


def test_no_text_is_read_for_two_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt", "ignored.csv"):
        (texts / name).write_text("w1", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(texts / "a.txt")
    (texts / "link.txt").symlink_to(texts / "a.txt")  # a folder may repeat itself
    monkeypatch.chdir(tmp_path)
    check_datasets(["texts/a.txt", str(texts / "b.txt"), "texts/ignored.csv", "c4", "self"], 5)
    check_datasets(["texts", "texts/ignored.csv", "c4", "pile"], 4)
    for repeated in (
        ["texts/a.txt", str(texts / "a.txt")],
        ["b", "texts/a.txt", "link.txt"],
        ["texts", "link.txt"],
        ["texts/b.txt", "texts"],
        ["c4", "b", "allenai/c4:en:train"],
        ["allenai/c4:en", "c4"],
        ["a/b", "a/b::train"],
        ["self", "self"],
    ):
        with pytest.raises(OfflineError, match=r"^data sets '.*' and '.*' both read .* once"):
            check_datasets(repeated, 9)


def test_windows_do_not_overlap(tiny_model_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    windows = token_windows(["w0 w1 w2", "w3 w4 w5 w6"], tokenizer, 3, None)
    assert windows.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert token_windows(["w0 w1 w2", "w3 w4 w5"], tokenizer, 3, 1).tolist() == [[2, 3, 4]]


def test_sampling_follows_the_seed_and_held_out_windows_are_others(
    tiny_model_directory: Path, text_file: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)

    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = sample_windows(
            [str(text_file)],
            tokenizer,
            num_samples=8,
            sequence_length=16,
            seed=seed,
            num_held_out=4,
        )
        return drawn.calibration, drawn.held_out

    windows, held_out = draw(0)
    assert torch.equal(windows, draw(0)[0])
    assert not torch.equal(windows, draw(1)[0])
    assert windows.shape == (8, 16)
    assert held_out.shape == (4, 16)
    used = {tuple(window) for window in windows.tolist()}
    assert not used & {tuple(window) for window in held_out.tolist()}


def test_too_little_text_is_refused(tiny_model_directory: Path, text_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    with pytest.raises(OfflineError, match=r"gives 125 of the 1000 windows of 16 tokens"):
        sample_windows([str(text_file)], tokenizer, num_samples=1000, sequence_length=16, seed=0)


def test_every_window_begins_with_the_token_that_the_model_needs() -> None:
    windows = token_windows(["abcd", "efgh"], Beginning(), 4, None)
    assert windows.tolist() == [[7, *map(ord, part)] for part in ("abc", "d\n\n", "efg", "h\n\n")]
    assert token_windows(["abcdefgh"], Beginning(), 4, 2).shape == (2, 4)
    drawn, _ = document_windows(["abcdefgh", "abc"], Beginning(), 4, 5, seed=0)
    assert drawn[:, 0].tolist() == [7] * 5
    assert (drawn[:, 2] - drawn[:, 1]).tolist() == [1] * 5


def never(*_: object, **__: object) -> None:
    raise AssertionError("text was tokenised")


def test_windows_beyond_the_positions_of_the_model_are_refused(
    text_file: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(open_source(str(tiny_model_directory)))
    assert len(sample_windows([str(text_file)], tokenizer, **_one_window(128)).calibration) == 1
    monkeypatch.setattr(type(tokenizer), "__call__", never)
    with pytest.raises(OfflineError, match=r"129 tokens.* 128 positions.*--sequence-length 128 or"):
        sample_windows([str(text_file)], tokenizer, **_one_window(129))


def _one_window(sequence_length: int) -> dict[str, int]:
    return {"num_samples": 1, "sequence_length": sequence_length, "seed": 0}


@pytest.mark.parametrize(
    ("texts", "warned", "read"),
    [
        (["abcdefgh"], False, 1),  # ten tokens with their separator
        (["abcdefghi"], True, 1),
        (["ab", "cdef"], False, 2),
        (["ab", "cdef", "g", "h"], True, 2),
    ],
)
def test_text_beyond_the_limit_is_warned_of(
    texts: list[str],
    warned: bool,
    read: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(windows, "MAX_TOKENS", 10)
    tokenizer = Beginning()
    assert token_windows(texts, tokenizer, 6, None).shape == (2, 6)
    assert tokenizer.tokenized == "".join(f"{text}\n\n" for text in texts[:read])
    assert ("only the first 10 tokens of the text are read" in caplog.text) == warned
    caplog.clear()
    token_windows(texts, Beginning(), 6, 2)
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "before", "after"), [("x.txt", "", ""), ("x.jsonl", '{"text": "', '"}')]
)
@pytest.mark.parametrize("more", ["", "i"])
def test_only_the_beginning_of_a_huge_document_is_read(
    name: str,
    before: str,
    after: str,
    more: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert MAX_CHARACTERS == 16 * windows.MAX_TOKENS
    monkeypatch.setattr("permllm_offline.text.documents.MAX_CHARACTERS", 8)
    file = tmp_path / name
    file.write_text(f"{before}abcdefgh{more}{after}", encoding="utf-8")
    tokenizer = Beginning()
    token_windows(documents(str(file)), tokenizer, 6, None)
    assert tokenizer.tokenized == "abcdefgh\n\n"
    named = f"only the first 8 characters of a document of {file} are read"
    assert (named in caplog.text) == bool(more)


def test_documents_beyond_the_limit_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(windows, "MAX_TOKENS", 10)
    document_windows(["abcdefghi"], Beginning(), 4, 1, seed=0)
    assert not caplog.text
    document_windows(["abcdefghi", "j"], Beginning(), 4, 1, seed=0)
    assert "only the first 10 tokens" in caplog.text


def test_progress_is_shown_where_tokens_take_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token_windows(["abcd", "efgh"], Beginning(), 4, None)
    assert not capsys.readouterr().err
    monkeypatch.setattr(windows, "QUIET_SECONDS", 0.0)
    token_windows(["abcd", "efgh"], Beginning(), 4, None)
    assert "tokens: 12.0token" in capsys.readouterr().err
