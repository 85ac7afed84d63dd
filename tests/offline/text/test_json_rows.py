import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from permllm_offline.errors import OfflineError
from permllm_offline.text import json_rows
from permllm_offline.text.documents import documents

ROWS = [{"text": text, "more": [1, {"a": "]"}]} for text in ("first", "a,]\n[\u2028", "", "last")]
TEXTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize("part", [1, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_file_may_be_one_array(
    name: str, indent: int | None, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_PART", part)
    text = json.dumps(ROWS, indent=indent, ensure_ascii=False)
    (tmp_path / name).write_text(f"\ufeff\n {text}\n", encoding="utf-8")
    assert list(documents(str(tmp_path / name))) == TEXTS


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[ ]\n", encoding="utf-8")
    assert list(documents(str(tmp_path / "x.json"))) == []


def test_an_array_is_read_row_by_row(tmp_path: Path) -> None:
    """What is far behind is not even decoded: data sets may be larger than memory."""
    row = json.dumps({"text": "a" * 10_000}).encode() + b",\n"
    (tmp_path / "x.json").write_bytes(b"[" + 100 * row + b"\xff is no UTF-8")
    assert list(islice(documents(str(tmp_path / "x.json")), 50)) == 50 * ["a" * 10_000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {oops}]', r"row 2: not JSON .* must be one array"),
        ('[{"text": "a"} {"text": "b"}]', r"row 1: not JSON \(Expecting ',' delimiter\)"),
        ('[{"text": "a"}, ]', "row 2: not JSON"),
        ('[{"text": "a"}', "row 1: not JSON"),
        ("[", "row 1: not JSON"),
        ('[{"text": "a"}] garbage', r"x\.json: more follows the array \('garbage'\)"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "more follows the array"),
        (f'[{{"text": "a"}}]{" " * 200_000}]', r"more follows the array \('\]'\)"),
        ("[] 1", "row 1: not JSON"),
        ("[12]", r"row without a string field .*found: int"),
    ],
)
def test_what_is_no_array_of_objects_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(OfflineError, match=message):
        list(documents(str(tmp_path / "x.json")))


def test_nothing_behind_an_array_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_PART", 1)
    for number, rest in enumerate(("]", " ]", "\n\n x")):
        file = tmp_path / f"{number}.json"
        file.write_text(f"{json.dumps(ROWS)}{rest}", encoding="utf-8")
        with pytest.raises(OfflineError, match="more follows the array"):
            list(documents(str(file)))


def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, ROWS))
    for name, text in (("a.json.gz", json.dumps(ROWS)), ("b.JSONL.GZ", lines), ("c.txt.gz", "c")):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    (tmp_path / "d.tar.gz").write_bytes(b"not read")
    assert list(documents(str(tmp_path))) == [*TEXTS, *TEXTS, "c"]


@pytest.mark.parametrize("damage", ["cut short", "not compressed", "altered"])
def test_a_damaged_compressed_file_is_named(damage: str, tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(f'{{"text": "{n * n}"}}' for n in range(999)).encode())
    middle = len(whole) // 2
    contents = {
        "cut short": whole[:middle],
        "not compressed": b'{"text": "a"}',
        "altered": whole[:10] + b"\xff" + whole[11:],
    }
    (tmp_path / "x.jsonl.gz").write_bytes(contents[damage])
    with pytest.raises(
        OfflineError, match=r"cannot read .*x\.jsonl\.gz.*\. Fetch or compress the file again"
    ):
        list(documents(str(tmp_path / "x.jsonl.gz")))


def test_compressed_parquet_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress(b"PAR1\xff"))
    with pytest.raises(OfflineError, match="holds no text"):
        list(documents(str(tmp_path)))
    with pytest.raises(OfflineError, match="Give parquet itself, or UTF-8 text"):
        list(documents(str(tmp_path / "x.parquet.gz")))
