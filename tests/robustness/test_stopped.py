"""A command that is killed, interrupted or out of disk leaves its output absent or complete."""

import errno
import os
import resource
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from permllm_offline.cli import main
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama
from tests.robustness.children import child
from tests.robustness.stages import (
    cut_short,
    obey_permissions,
    stop_at,
    stop_before_the_new_name,
)

WRITING = [
    "the directory is made",
    "a shard is written",
    "a shard gets its name",
    "companions are copied",
    "a file is written",
    "a file is written:1",
    "files are synchronized:1",
    "the output gets its name",
]
PRUNING = ["a finished step is written", "a finished step gets its name", "a file is written:5"]
KILLED_AT = [
    *(("prune", stage) for stage in [*PRUNING, *WRITING]),
    *(("convert", stage) for stage in WRITING),
    *(("to dense", stage) for stage in WRITING),
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
    """A command line by name, and the output of those that write one."""
    output = tmp_path / "work" / "out"
    output.parent.mkdir()
    lines = {
        "prune": lambda: [
            *("prune", str(request.getfixturevalue("model"))),
            *("--method", "magnitude", "--pattern", "2:4"),
        ],
        "convert": lambda: ["convert", str(request.getfixturevalue("masked"))],
        "to dense": lambda: ["convert", str(request.getfixturevalue("sparse")), "--to", "dense"],
        "eval": lambda: ["eval", str(request.getfixturevalue("model"))],
        "eval sparse": lambda: ["eval", str(request.getfixturevalue("sparse"))],
    }
    line = lines[request.param]()
    if line[0] != "eval":
        return [*line, "--output", str(output)], output
    text = request.getfixturevalue("model") / "text.txt"
    return [*line, "--dataset", str(text), "--sequence-length", "32"], output


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


@pytest.mark.parametrize(("command", "stage"), KILLED_AT, indirect=["command"])
def test_a_killed_command_leaves_no_half_of_an_output(
    command: tuple[list[str], Path], stage: str
) -> None:
    line, output = command
    assert child(line, partial(stop_at, stage, signal.SIGKILL)).status == -signal.SIGKILL
    assert not output.exists()
    assert main(line) == 0  # the leftovers of the killed one are in nobody's way
    assert complete(output)


@pytest.mark.parametrize("command", ["convert"], indirect=True)
@pytest.mark.parametrize("stage", ["a shard is written:2", "a shard gets its name:2"])
def test_a_conversion_killed_between_two_shards(
    command: tuple[list[str], Path], stage: str
) -> None:
    line, output = command
    line += ["--max-shard-bytes", "50000"]
    assert child(line, partial(stop_at, stage, signal.SIGKILL)).status == -signal.SIGKILL
    (partial_output,) = output.parent.iterdir()
    assert partial_output.suffix == ".partial"
    assert main(line) == 0
    assert complete(output)
    assert len(list(output.glob("model-*.safetensors"))) > 3


@COMMANDS
@pytest.mark.parametrize("stage", ["the output gets its name", "what was replaced is removed"])
def test_a_killed_replacement_leaves_the_old_or_the_new(
    command: tuple[list[str], Path], stage: str
) -> None:
    line, output = command
    assert main(line) == 0
    ended = child([*line, "--force"], partial(stop_at, stage, signal.SIGKILL))
    assert ended.status == -signal.SIGKILL
    assert complete(output)


@pytest.mark.parametrize("command", ["convert"], indirect=True)
def test_a_replacement_killed_between_two_names_keeps_the_old_output(
    command: tuple[list[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    line, output = command
    assert main(line) == 0
    assert child([*line, "--force"], stop_before_the_new_name).status == -signal.SIGKILL
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
    assert child(line, partial(stop_at, stage, signal.SIGINT)).status == 130
    assert left_beside(output) == []
    assert main(line) == 0
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert complete(output)


@COMMANDS
def test_a_disk_that_fills_up_leaves_nothing(command: tuple[list[str], Path]) -> None:
    line, output = command
    limit = (50_000, 50_000)  # bytes of the largest file
    ended = child(line, partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit))
    assert ended.status == 2
    assert "File too large" in ended.errors
    assert "remedy: free some space or choose another output directory" in ended.errors
    assert left_beside(output) == []


@COMMANDS
def test_a_directory_without_permission_is_named(command: tuple[list[str], Path]) -> None:
    line, output = command
    output.parent.chmod(0o555)
    ended = child(line, obey_permissions)
    output.parent.chmod(0o755)
    assert ended.status == 2
    assert "Permission denied" in ended.errors
    assert "rule: the place is writable" in ended.errors
    assert str(output.parent) in ended.errors
    assert left_beside(output) == []


@COMMANDS
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC], ids=os.strerror)
def test_a_directory_that_cannot_be_written_is_named(
    command: tuple[list[str], Path],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file system that is full or read-only needs an administrator: its errors are made here."""
    line, output = command

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(line) == 2
    error = capsys.readouterr().err
    assert os.strerror(number) in error
    assert "remedy: free some space or choose another output directory" in error
    assert left_beside(output) == []


READING = pytest.mark.parametrize(
    "command", ["prune", "convert", "to dense", "eval", "eval sparse"], indirect=True
)


@pytest.fixture
def own_source(command: tuple[list[str], Path], tmp_path: Path) -> Path:
    """The weights of a copy of the model, which the command reads in its place."""
    source = shutil.copytree(command[0][1], tmp_path / "source")
    command[0][1] = str(source)
    return source / "model.safetensors"


@READING
def test_weights_without_permission_are_named(
    command: tuple[list[str], Path], own_source: Path
) -> None:
    line, output = command
    own_source.chmod(0)
    ended = child(line, obey_permissions)
    assert ended.status == 2
    assert f"{own_source}: found what cannot be opened" in ended.errors
    assert "Permission denied" in ended.errors
    assert list(output.parent.iterdir()) == []


@COMMANDS
def test_a_companion_without_permission_is_named_before_any_work(
    command: tuple[list[str], Path], own_source: Path
) -> None:
    line, output = command
    companion = own_source.with_name("tokenizer.json")
    companion.chmod(0)
    ended = child(line, obey_permissions)
    assert ended.status == 2
    assert f"{companion}: found a file that cannot be opened" in ended.errors
    assert "Permission denied" in ended.errors
    assert "judge" not in ended.errors  # the bar of the first pass
    assert list(output.parent.iterdir()) == []


@READING
@pytest.mark.parametrize("reads", [0, 5])
def test_weights_that_shrink_while_they_are_read_are_named(
    command: tuple[list[str], Path], own_source: Path, reads: int
) -> None:
    """A disk that is unplugged does the same to what maps a file: the process ends."""
    line, output = command
    ended = child(line, partial(cut_short, own_source, reads))
    assert ended.status == 2
    assert f"{own_source}: found a file that ends" in ended.errors
    assert "it was cut short while it was read" in ended.errors
    assert left_beside(output) == []


@READING
def test_local_work_opens_no_connection(
    command: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for settings in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    line, output = command
    assert main(line) == 0
    if output.exists() and "dense" not in line:
        assert main(["inspect", str(output)]) == 0
    assert asked == []
