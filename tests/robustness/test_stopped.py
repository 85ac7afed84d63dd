"""A command that is killed, interrupted or out of disk leaves its output absent or complete."""

import errno
import os
import resource
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from permllm_offline.cli import main
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama
from tests.robustness.children import child
from tests.robustness.stages import stop_at, stop_before_the_new_name

KILLED_AT = [
    "the directory is made",
    "a shard is written",
    "a shard gets its name",
    "companions are copied",
    "a file is written",
    "a file is written:2",
    "files are synchronized",
    "the output gets its name",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of one decoder layer."""
    directory = tmp_path_factory.mktemp("models") / "dense"
    tiny_llama(num_hidden_layers=1).save_pretrained(directory)
    save_tokenizer(directory)
    (directory / "text.txt").write_text(random_text(600, seed=1), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def sparse(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, pruned."""
    directory = tmp_path_factory.mktemp("models") / "sparse"
    assert main(["prune", str(model), "--output", str(directory), "--method", "magnitude"]) == 0
    return directory


@pytest.fixture(scope="module")
def masked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint that obeys 2:4, as other tools leave it."""
    directory = tmp_path_factory.mktemp("models") / "masked"
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor.view(-1, 4)[:, :2] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def command(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], Path]:
    """A command line without its output, by name, and the output."""
    output = tmp_path / "work" / "out"
    output.parent.mkdir()
    lines = {
        "prune": lambda: ["prune", str(request.getfixturevalue("model")), "--method", "magnitude"],
        "convert": lambda: ["convert", str(request.getfixturevalue("masked"))],
        "to dense": lambda: ["convert", str(request.getfixturevalue("sparse")), "--to", "dense"],
    }
    return [*lines[request.param](), "--output", str(output)], output


def complete(output: Path) -> bool:
    """Whether an existing checkpoint is whole."""
    reader = CheckpointReader(output)
    if reader.quantization is not None:
        return validate(output) == []
    return len(dict(reader.dense_state_dict())) > 0


def left_beside(output: Path) -> list[str]:
    """What lies there, but for the finished layers from which a prune resumes."""
    return [path.name for path in output.parent.iterdir() if path.name != f".{output.name}.work"]


COMMANDS = pytest.mark.parametrize("command", ["prune", "convert", "to dense"], indirect=True)


@COMMANDS
@pytest.mark.parametrize("stage", KILLED_AT)
def test_a_killed_command_leaves_no_half_of_an_output(
    command: tuple[list[str], Path], stage: str
) -> None:
    line, output = command
    name, _, passes = stage.partition(":")
    status = child(line, partial(stop_at, name, int(passes or 0), signal.SIGKILL))
    if status == 0:
        pytest.skip(f"this command does not come to {stage!r}")
    assert status == -signal.SIGKILL
    assert not output.exists()
    assert main(line) == 0  # the leftovers of the killed one are in nobody's way
    assert complete(output)


@COMMANDS
@pytest.mark.parametrize("stage", ["the output gets its name", "what was replaced is removed"])
def test_a_killed_replacement_leaves_the_old_or_the_new(
    command: tuple[list[str], Path], stage: str
) -> None:
    line, output = command
    assert main(line) == 0
    status = child([*line, "--force"], partial(stop_at, stage, 0, signal.SIGKILL))
    assert status == -signal.SIGKILL
    assert complete(output)


@pytest.mark.parametrize("command", ["convert"], indirect=True)
def test_a_replacement_killed_between_two_names_keeps_the_old_output(
    command: tuple[list[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    line, output = command
    assert main(line) == 0
    assert child([*line, "--force"], stop_before_the_new_name) == -signal.SIGKILL
    assert not output.exists()
    (old,) = output.parent.glob(".out.*.replaced")
    assert complete(old)
    assert main(line) == 0
    assert f"{old} is what was in {output} before" in caplog.text
    assert "cut off; rename it back" in caplog.text
    assert complete(old)  # whoever wants it can still have it
    assert main([*line, "--force"]) == 0
    assert f"{old} is left of what was replaced in {output}; remove it" in caplog.text


@COMMANDS
@pytest.mark.parametrize(
    "stage", ["a shard is written", "companions are copied", "a file is written"]
)
def test_an_interrupted_command_leaves_nothing(command: tuple[list[str], Path], stage: str) -> None:
    line, output = command
    assert child(line, partial(stop_at, stage, 0, signal.SIGINT)) == 130
    assert left_beside(output) == []
    assert main(line) == 0
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert complete(output)


@COMMANDS
def test_a_disk_that_fills_up_leaves_nothing(command: tuple[list[str], Path]) -> None:
    line, output = command
    limit = (50_000, 50_000)  # bytes of the largest file
    assert child(line, partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)) == 2
    assert left_beside(output) == []


@COMMANDS
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=os.strerror)
def test_a_directory_that_cannot_be_written_is_named(
    command: tuple[list[str], Path],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error of the system call is made here: permissions do not bind an administrator."""
    line, output = command

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(line) == 2
    error = capsys.readouterr().err
    assert os.strerror(number) in error
    assert "remedy: free some space or choose another output directory" in error
    assert left_beside(output) == []


@COMMANDS
def test_local_work_opens_no_connection(
    command: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments[1:]} was opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    line, output = command
    assert main(line) == 0
    if "dense" not in line:
        assert main(["inspect", str(output)]) == 0
