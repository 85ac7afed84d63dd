"""Which checkpoints and options the serving benchmark accepts together."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.records.rows import Rows


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "hidden_size": 8}))
    return folder


def test_rows_of_one_checkpoint_are_not_those_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, first, second = (checkpoint(tmp_path / name) for name in ("model", "B1", "B2"))

    def compare(variants: Sequence[str], cells: Any, start: Any, rows: Rows, **_: Any) -> None:
        rows.update({"variant": name, "batch": 1, "prompt_tokens": 32} for name in variants)

    monkeypatch.setattr(serving, "compare", compare)
    monkeypatch.setattr(serving, "show", lambda rows, title: None)

    def run(sparse: Path) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [
            *("serving", "--dense", str(dense), "--sparse", str(sparse)),
            *("--json", str(tmp_path / "result.json")),
        ])  # fmt: skip
        serving.main()
        found: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
        return found

    facts = run(first)["checkpoints"]
    assert [one["name"] for one in facts.values()] == ["model", "B1"]
    with pytest.raises(SystemExit):
        run(second)
    assert "its rows have checkpoints" in capsys.readouterr().err
    (first / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(SystemExit):
        run(first)
    assert "its rows have checkpoints" in capsys.readouterr().err
    (first / "model.safetensors").unlink()
    assert run(first)["checkpoints"] == facts


def test_only_variants_that_are_asked_for_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = checkpoint(tmp_path / "model")
    made: list[Path] = []

    def sparse(source: Path) -> Path:
        made.append(source)
        return source

    def compare(
        variants: Sequence[str], cells: Any, start: Any, rows: Rows, **options: Any
    ) -> None:
        assert (variants, cells, options["dense"]) == (["2:4 int8"], [(8, 512)], "dense bfloat16")
        start(*variants)
        rows.update({"variant": name, "batch": 1, "prompt_tokens": 32} for name in variants)

    monkeypatch.setattr(serving, "VARIANTS", {**serving.VARIANTS, "2:4 int8": sparse})
    monkeypatch.setattr(serving, "random_model", lambda name: dense)
    monkeypatch.setattr(serving, "Engine", lambda path, **options: None)
    monkeypatch.setattr(serving, "compare", compare)
    monkeypatch.setattr(serving, "show", lambda rows, title: None)
    monkeypatch.setattr(sys, "argv", [
        *("serving", "--model", "llama-2-7b", "--variants", "2:4 int8", "--cells", "8x512"),
        *("--json", str(tmp_path / "result.json")),
    ])  # fmt: skip
    serving.main()
    assert made == [dense]


def test_variations_serve_the_checkpoint_of_their_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = checkpoint(tmp_path / "model")
    started: list[tuple[str, str, str]] = []

    def compare(
        variants: Sequence[str], cells: Any, start: Any, rows: Rows, **options: Any
    ) -> None:
        for name in variants:
            start(name)
        rows.update({"variant": name, "batch": 1, "prompt_tokens": 32} for name in variants)

    def engine(path: Path, *, dtype: str, head: str, **options: Any) -> None:
        started.append((path.name, dtype, head))

    made = {**serving.VARIANTS, "2:4 int8": lambda dense: dense.with_name("int8")}
    monkeypatch.setattr(serving, "VARIANTS", made)
    monkeypatch.setattr(serving, "random_model", lambda name: dense)
    monkeypatch.setattr(serving, "Engine", engine)
    monkeypatch.setattr(serving, "compare", compare)
    monkeypatch.setattr(serving, "show", lambda rows, title: None)
    monkeypatch.setattr(sys, "argv", [
        *("serving", "--variants", "dense bfloat16", "dense float16", "2:4 int8 (float16)"),
        "2:4 int8, int8 head",
        *("--json", str(tmp_path / "result.json")),
    ])  # fmt: skip
    serving.main()
    assert started == [
        ("model", "bfloat16", "dense"),
        ("int8", "bfloat16", "int8"),
        ("model", "float16", "dense"),
        ("int8", "float16", "dense"),
    ]


def test_rows_with_one_kv_cache_are_not_those_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = str(checkpoint(tmp_path / "model")), tmp_path / "result.json"
    monkeypatch.setenv(serving.KV_CACHE, "2")

    def compare(variants: Sequence[str], cells: Any, start: Any, rows: Rows, **_: Any) -> None:
        rows.update({"variant": name, "batch": 1, "prompt_tokens": 32} for name in variants)

    monkeypatch.setattr(serving, "compare", compare)
    monkeypatch.setattr(serving, "show", lambda rows, title: None)

    def run(*options: str) -> dict[str, Any]:
        command = ("serving", "--dense", folder, "--sparse", folder)
        monkeypatch.setattr(sys, "argv", [*command, "--json", str(output), *options])
        serving.main()
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    assert run()["kv_cache_gib"] == 2
    with pytest.raises(SystemExit):
        run("--kv-cache", "4")
    assert "its rows have kv_cache_gib 2, this run has 4" in capsys.readouterr().err
    # Before this was a setting, every engine had 1 GiB.
    older = json.loads(output.read_text())
    del older["kv_cache_gib"]
    output.write_text(json.dumps(older))
    with pytest.raises(SystemExit):
        run("--kv-cache", "2")
    assert "its rows have kv_cache_gib 1, this run has 2" in capsys.readouterr().err
    assert run("--kv-cache", "1")["kv_cache_gib"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "2:4 int8"], "stand in place of --model and --variants"),
        (["--model", "tinyllama"], "stand in place of --model and --variants"),
        (["--sparse", "nowhere"], "nowhere is no checkpoint"),
        (["--cells", "8"], "'8' is no cell: give sequences x tokens of each prompt"),
        (["--cells", "0x32"], "'0x32' is no cell"),
        (["--memory-limit", "0"], "--memory-limit 0: give more than 0 GiB"),
        (["--kv-cache", "0"], "a KV cache of '0' GiB: give a whole number, at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(checkpoint(tmp_path / "model"))
    monkeypatch.setenv(serving.KV_CACHE, "1")  # gives back what the command sets
    command = ["serving", "--dense", folder, "--sparse", folder, "--json", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    with pytest.raises(SystemExit):
        serving.main()
    assert message in capsys.readouterr().err
