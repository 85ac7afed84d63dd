"""`permllm-offline convert` on the command line."""

import json
from pathlib import Path

import pytest

from permllm_offline.cli import build_parser, main
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import prune, same_weights


@pytest.fixture(scope="module")
def source(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(dense, tmp_path_factory.mktemp("sources") / "source")


def test_there_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse, back, json_file = (tmp_path / name for name in ("sparse", "back", "report.json"))
    options = ("--output", str(sparse), "--json", str(json_file))
    assert main(["convert", str(source), *options]) == 0
    shown = capsys.readouterr()
    assert "model.layers.*.self_attn.o_proj" in shown.out
    assert "0-1" in shown.out
    assert "judge as 2:4" in shown.err  # progress
    report = json.loads(json_file.read_text())
    assert report == json.loads((sparse / "conversion.json").read_text())
    assert len(report["linears"]) == 14
    assert validate(sparse) == []
    assert main(["convert", str(sparse), "--to", "dense", "--output", str(back)]) == 0
    assert same_weights(source, back)


def test_int8_from_either_source(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(given: Path, output: str, *options: str) -> int:
        return main(["convert", str(given), "--output", str(tmp_path / output), *options])

    assert convert(source, "sparse") == 0
    assert "rounding error" not in capsys.readouterr().out
    for given, output in ((source, "one-step"), (tmp_path / "sparse", "two-steps")):
        assert convert(given, output, "--values", "int8") == 0
        assert "rounding error" in capsys.readouterr().out
        assert main(["inspect", "--verify", str(tmp_path / output)]) == 0
        capsys.readouterr()
    assert same_weights(tmp_path / "one-step", tmp_path / "two-steps")
    assert convert(tmp_path / "one-step", "back", "--to", "dense") == 0
    for options, message in (
        (("--values", "int8"), "are int8: nothing to do"),
        ((), "is of this format already. Serve it, or give --to dense"),
        (("--values", "int8", "--to", "dense"), "leave it out with --to dense"),
    ):
        assert convert(tmp_path / "one-step", "again", *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_nothing_is_replaced_unasked(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    options = ("--output", str(tmp_path / "out"))
    assert main(["convert", str(source), *options]) == 2
    assert "is not empty; rule" in capsys.readouterr().err
    assert main(["convert", str(source), *options, "--force"]) == 2
    assert "is not empty and holds no config.json" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").exists()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert main(["convert", str(source), *options, "--force"]) == 2
    assert "is not empty and holds no model.safetensors or" in capsys.readouterr().err
    (tmp_path / "out" / "model.safetensors").touch()
    assert main(["convert", str(source), *options, "--force"]) == 0
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "dense", "--strict"), "leave them out with --to dense"),
        (("--to", "dense"), "is dense already: what becomes dense is a permllm"),
        (("--max-shard-bytes", "0"), "give at least 1"),
        (("--values", "int4", "--to", "dense"), "leave it out with --to dense"),
    ],
)
def test_bad_requests_are_refused(
    source: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["convert", str(source), "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_parser().parse_args(["convert", "--help"])
    assert "examples:" in capsys.readouterr().out
