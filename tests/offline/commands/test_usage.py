"""What the command says around its work: version, usage, what to do next, what is missing."""

import shutil
from pathlib import Path

import pytest

import permllm_offline
from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_vllm import __version__


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"permllm-offline {__version__}\n"


def test_what_is_left_over_is_refused_with_the_usage_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "my", "model"])
    error = capsys.readouterr().err
    assert error.startswith("usage: permllm-offline plan ")
    assert "unrecognized arguments: model (a name with spaces wants quotes)" in error


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_help_names_every_kind_of_file_that_is_read(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "a .txt, .md, .jsonl, .json (also .gz) or .parquet file, a folder" in words


@pytest.mark.parametrize("command", ["plan", "prune", "eval", "convert", "inspect"])
def test_every_command_names_what_is_no_folder(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.bin"
    file.write_text("no folder")
    output = ("--output", str(tmp_path / "out")) if command in ("prune", "convert") else ()
    text = ("--dataset", str(file)) if command == "eval" else ()
    assert main([command, str(file), *output, *text]) == 2
    assert "is not a folder. Give " in capsys.readouterr().err


def test_after_a_prune_stands_where_it_is_and_what_comes_next(
    tmp_path: Path,
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, output = tmp_path / "model", tmp_path / "my [/b] model"
    shutil.copytree(tiny_model_directory, model, ignore=shutil.ignore_patterns("tokenizer*"))
    arguments = ("--output", str(output), "--method", "magnitude")
    assert main(["prune", str(model), *arguments]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert (output / "report.html").is_file()
    assert f"wrote {output}; what happened to each layer: {output}/report.html" in shown
    serve = f"serve it: VLLM_CPU_KVCACHE_SPACE=4 vllm serve '{output}' --max-model-len "
    assert any(line.startswith(serve) for line in shown)
    assert f"evaluate it: permllm-offline eval '{output}' --dataset TEXT" in shown
    assert "vLLM and eval need the tokenizer of the checkpoint" in caplog.text


def test_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    for call in (permllm_offline.prune, permllm_offline.evaluate):
        with pytest.raises(OfflineError, match=r"the model is a dict in memory: give the folder"):
            call({}, tmp_path / "text.txt")
