import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from permllm_vllm.checkpoint.writer import write_checkpoint


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_one_shard_has_no_index(tiny_model: Any, tmp_path: Path) -> None:
    output = tiny_model.write(tmp_path / "deep" / "out")
    expected = ["SHA256SUMS", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(contents(output)) == expected
    with safe_open(output / "model.safetensors", framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    stored = load_file(output / "model.safetensors")
    assert stored.keys() == tiny_model.tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tiny_model.tensors.items())


def test_weights_are_for_whoever_may_read_the_rest(tiny_model: Any, tmp_path: Path) -> None:
    output = tiny_model.write(tmp_path / "out", max_shard_bytes=14_000)
    modes = {path.stat().st_mode for path in output.iterdir()}
    assert modes == {(output / "config.json").stat().st_mode}


def test_shards_are_numbered_indexed_and_small(tiny_model: Any, tmp_path: Path) -> None:
    limit = 14_000
    output = tiny_model.write(tmp_path / "out", max_shard_bytes=limit)
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in tiny_model.tensors.values())
    assert index["metadata"] == {"total_size": total}
    for file in files:
        stored = load_file(output / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(stored)
        assert len(stored) == 1 or sum(tensor.nbytes for tensor in stored.values()) <= limit
    assert index["weight_map"].keys() == tiny_model.tensors.keys()


def test_one_shard_is_in_memory_at_a_time(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a tensor is asked for, earlier shards are on disk and their tensors freed."""
    limit, unwritten, written = 20_000, [], []

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        written.extend(weakref.ref(tensor) for tensor in tensors.values())

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        given = 0
        for name, tensor in tiny_model.tensors.items():
            unwritten.append(given - sum(f.stat().st_size for f in tmp_path.glob(".out.*/*")))
            assert not any(reference() is not None for reference in written)
            given += tensor.nbytes
            yield name, tensor

    monkeypatch.setattr("permllm_vllm.checkpoint.writer.save_file", save)
    arguments = (tiny_model.quantization, tiny_model.source)
    write_checkpoint(tmp_path / "out", tensors(), *arguments, max_shard_bytes=limit)
    assert max(unwritten) <= limit + max(t.nbytes for t in tiny_model.tensors.values())
    assert len(written) == len(tiny_model.tensors)


def test_companions_are_carried_over_and_old_weights_are_not(
    tiny_model: Any, tmp_path: Path
) -> None:
    source = tiny_model.source
    kept = ["chat_template.jinja", "generation_config.json", "LICENSE", "tokenizer.model"]
    kept += ["additional_chat_templates/tool.jinja"]
    dropped = ["pytorch_model.bin", "model-00001-of-00002.safetensors", "a.gguf", ".gitattributes"]
    dropped += ["pytorch_model.bin.index.json", "model.safetensors.index.json", "original/a.pth"]
    for name in kept + dropped:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    extra = {"README.md": "# card\n", "report.json": b"{}", "LICENSE": "ours"}
    output = tiny_model.write(tmp_path / "out", total_bytes=0, extra_files=extra)
    written = contents(output)
    made = {"tokenizer.json", "config.json", "model.safetensors", "SHA256SUMS"}
    assert set(written) == {*kept, *extra, *made}
    assert written["LICENSE"] == b"ours"
    assert written["README.md"] == b"# card\n"
    assert written["tokenizer.model"] == b"tokenizer.model"


def test_modules_of_sentence_transformers_are_carried_over(tiny_model: Any, tmp_path: Path) -> None:
    modules = [
        {"path": path}
        for path in ("", "1_Pooling", "2_Dense", "3_Normalize", "../other", "..", ".")
    ]
    source = tiny_model.source
    kept = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    (tmp_path / "other").mkdir()
    for name in [*kept, "4_Unnamed/config.json", "../other/config.json", "../config.json"]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "modules.json").write_text(json.dumps(modules))
    written = contents(tiny_model.write(tmp_path / "out"))
    made = {"tokenizer.json", "config.json", "model.safetensors", "SHA256SUMS"}
    assert set(written) == {*kept, *made, "modules.json"}
    assert (tmp_path / "config.json").read_text() == "../config.json"  # not one of the model's
    (source / "2_Dense" / "model.safetensors").rename(source / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"2_Dense/pytorch_model\.bin: found other weights"):
        tiny_model.write(tmp_path / "again")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"path": 2}]', '[{"path": "/etc"}]'])
def test_other_lists_of_modules_name_nothing(tiny_model: Any, tmp_path: Path, content: str) -> None:
    (tiny_model.source / "modules.json").write_text(content)
    assert "modules.json" in contents(tiny_model.write(tmp_path / "out"))


def test_config_keeps_everything_and_gains_the_quantization(
    tiny_model: Any, tmp_path: Path
) -> None:
    original = {"z": 1, "nested": {"b": [1, 2.5]}, "text": "ü", "dtype": "float32"}
    old = {"quant_method": "old"}
    stale = {**original, "quantization_config": old, "compression_config": old}
    stale["nested"] = original["nested"] | {"quantization_config": old}
    stale["auto_map"] = {"AutoConfig": "code_of_its_own.Config"}
    (tiny_model.source / "config.json").write_text(json.dumps(stale))
    output = tiny_model.write(tmp_path / "out", config_updates={"dtype": "bfloat16"})
    config = json.loads((output / "config.json").read_text())
    assert config.pop("quantization_config") == tiny_model.quantization.to_dict()
    assert config == {**original, "dtype": "bfloat16"}


def test_a_dense_checkpoint_has_no_quantization(tiny_model: Any, tmp_path: Path) -> None:
    sparse = CheckpointReader(tiny_model.write(tmp_path / "sparse"))
    write_checkpoint(tmp_path / "dense", sparse.dense_state_dict(), None, tmp_path / "sparse")
    dense = CheckpointReader(tmp_path / "dense")
    assert "quantization_config" not in dense.config
    assert set(dense.names()) == set(tiny_model.dense)
    for name, tensor in tiny_model.dense.items():
        assert torch.equal(dense.tensor(name), tensor)


def test_views_shared_and_strided_tensors_are_written(tiny_model: Any, tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"a": base, "b": base, "rows": base[1:], "t": base.t(), "e": base[:1].expand(3, 4)}
    write_checkpoint(tmp_path / "out", tensors.items(), None, tiny_model.source)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert stored.keys() == tensors.keys()


def test_an_interrupted_write_leaves_nothing(tiny_model: Any, tmp_path: Path) -> None:
    def tensors(error: BaseException) -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tiny_model.tensors.items())[:-1]
        raise error

    before = sorted(tmp_path.iterdir())
    for error in (
        KeyboardInterrupt("stop"),
        RuntimeError("out of memory"),
        OSError("model unreadable"),
    ):
        with pytest.raises(type(error), match=str(error)):
            write_checkpoint(
                tmp_path / "out",
                tensors(error),
                tiny_model.quantization,
                tiny_model.source,
                max_shard_bytes=10_000,
            )
        assert sorted(tmp_path.iterdir()) == before


def test_a_killed_write_leaves_no_output(tiny_model: Any, tmp_path: Path) -> None:
    def killed_midway() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tiny_model.tensors.items())[:-1]
        os._exit(9)  # like a kill: no handler, no clean-up

    child = os.fork()
    if child == 0:
        try:
            write_checkpoint(
                tmp_path / "out",
                killed_midway(),
                tiny_model.quantization,
                tiny_model.source,
                max_shard_bytes=10_000,
            )
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    assert validate(tiny_model.write(tmp_path / "out")) == []


def test_a_failed_replacement_keeps_what_was_there(tiny_model: Any, tmp_path: Path) -> None:
    output = tiny_model.write(tmp_path / "out")
    (output / "note.txt").write_text("mine")
    before = contents(output)
    removed = tiny_model.tensors.pop("model.layers.1.mlp.up_proj.weight_mask")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight_mask: found nothing"
    ):
        tiny_model.write(output, force=True)
    assert contents(output) == before
    tiny_model.tensors["model.layers.1.mlp.up_proj.weight_mask"] = removed
    tiny_model.write(output, force=True)
    assert set(before) - set(contents(output)) == {"note.txt"}
    assert not list(tmp_path.glob(".out*"))


def test_two_writes_at_once_do_not_replace_each_other(tiny_model: Any, tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        tiny_model.write(tmp_path / "out", extra_files={"note.txt": "first"})
        yield from tiny_model.tensors.items()

    with pytest.raises(CheckpointError, match=r"complete in .*\.partial, but .*not empty"):
        write_checkpoint(tmp_path / "out", tensors(), tiny_model.quantization, tiny_model.source)
    assert (tmp_path / "out" / "note.txt").read_text() == "first"
    (kept,) = tmp_path.glob(".out.*.partial")
    assert validate(kept) == []


def test_a_full_disk_during_writing_is_named(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("permllm_vllm.checkpoint.writer.save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*free some space"):
        tiny_model.write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_doubled_missing_and_wrong_tensors_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    def refused(tensors: list[tuple[str, torch.Tensor]], message: str, **options: Any) -> None:
        arguments = (tiny_model.quantization, tiny_model.source)
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(tmp_path / "out", iter(tensors), *arguments, **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    everything = list(tiny_model.tensors.items())
    for limit in (1, 10**9):
        refused(
            [*everything, everything[0]],
            r"model\.embed_tokens\.weight: found a second tensor",
            max_shard_bytes=limit,
        )
    refused([], "no tensors to write")
    refused([*everything, ("model.layers.0.mlp.up_proj.g_idx", torch.zeros(1))], "unknown tensor")


def test_an_extra_file_may_tell_of_the_tensors(tiny_model: Any, tmp_path: Path) -> None:
    passed: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tiny_model.tensors.items():
            passed.append(name)
            yield name, tensor

    extra = {"text": lambda: " ".join(passed), "bytes": lambda: str(len(passed)).encode()}
    options = {"extra_files": extra, "total_bytes": 0}
    write_checkpoint(
        tmp_path / "out", tensors(), tiny_model.quantization, tiny_model.source, **options
    )
    assert (tmp_path / "out" / "text").read_text().split() == list(tiny_model.tensors)
    assert (tmp_path / "out" / "bytes").read_text() == str(len(tiny_model.tensors))


@pytest.mark.parametrize(
    "name",
    ["config.json", "SHA256SUMS", "x.safetensors", "../up.txt", "/tmp/x.txt", "a/../../b", ""],
)
def test_extra_files_stay_inside_and_replace_no_weights(
    tiny_model: Any, tmp_path: Path, name: str
) -> None:
    with pytest.raises(CheckpointError, match="relative name inside the checkpoint"):
        tiny_model.write(tmp_path / "out", extra_files={name: "x"})


def test_a_source_without_config_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    (tiny_model.source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: found nothing"):
        tiny_model.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_companion_that_cannot_be_read_is_named_before_any_tensor(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root reads everything, so the error of everybody else is made here."""
    unreadable = tiny_model.source / "merges.txt"
    unreadable.touch()
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == unreadable:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    def never() -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("a tensor was asked for")
        yield

    monkeypatch.setattr(Path, "open", refuse)
    message = r"source/merges\.txt: found a file that cannot be opened: .*denied.*make it readable"
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "out", never(), tiny_model.quantization, tiny_model.source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_companion_that_is_a_link_out_of_the_source_is_not_copied(
    tiny_model: Any, tmp_path: Path
) -> None:
    """What is pruned may be published: nothing of this machine may get into it."""
    (tmp_path / "secret").write_text("secret")
    (tiny_model.source / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"merges\.txt: found a link to .*secret"):
        tiny_model.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tiny_model.source / "merges.txt").unlink()
    (tiny_model.source / "additional_chat_templates").symlink_to(tmp_path)
    tiny_model.write(tmp_path / "out")
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
