import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from permllm_offline.calibration import sample_windows, token_windows
from permllm_offline.errors import OfflineError
from permllm_offline.texts import documents


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{oops', "line 2: not JSON"),
        ("x.jsonl", b'{"body": "a"}', 'without a string field "text" .found: body'),
        ("x.txt", b"\xff\xfe\x00", "cannot read"),
        ("x.parquet", b"nothing", "as parquet"),
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
    with pytest.raises(OfflineError, match=r"ConnectionError: no route\).*local \.txt"):
        list(documents("someone/corpus"))


def test_hub_names_may_carry_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return [{"text": "hello"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(documents("a/b:c:validation")) == ["hello"]
    list(documents("a/b", split="test"))
    assert asked == [("a/b", "c", "validation", True), ("a/b", None, "test", True)]


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
            str(text_file), tokenizer, num_samples=8, sequence_length=16, seed=seed, num_held_out=4
        )
        return drawn.calibration, drawn.held_out

    calibration, held_out = draw(0)
    assert torch.equal(calibration, draw(0)[0])
    assert not torch.equal(calibration, draw(1)[0])
    assert calibration.shape == (8, 16)
    assert held_out.shape == (4, 16)
    used = {tuple(window) for window in calibration.tolist()}
    assert not used & {tuple(window) for window in held_out.tolist()}


def test_too_little_text_is_refused(tiny_model_directory: Path, text_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    with pytest.raises(OfflineError, match=r"gives 125 windows of 16 tokens.*asks for 1000"):
        sample_windows(str(text_file), tokenizer, num_samples=1000, sequence_length=16, seed=0)
