"""Masks that were published apart from their model, in MaskLLM's form, are applied to it."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from permllm_offline.cli import main
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.packing import pack_mask
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import (
    masks_of,
    prune,
    same_weights,
    write_bitmask,
    write_masks,
)

FILE = "mask_compressed.npz"
FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(dense, tmp_path_factory.mktemp("pruned") / "plain")


@pytest.fixture(scope="module")
def masks(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks") / FILE, masks_of(pruned))


@pytest.mark.parametrize("folder", [False, True])
def test_a_dense_model_becomes_the_sparse_one(
    folder: bool, dense: Path, pruned: Path, masks: Path, tmp_path: Path
) -> None:
    given = masks.parent if folder else masks
    report = convert_to_sparse(str(dense), tmp_path / "out", masks=str(given), strict=True)
    assert report.source_format == f"a dense checkpoint under the masks of {given}"
    assert {linear.permutation for linear in report.linears} == {"none"}
    convert_to_sparse(str(pruned), tmp_path / "expected")
    assert validate(tmp_path / "out") == []
    assert same_weights(tmp_path / "out", tmp_path / "expected")


def test_kept_zeros_stay_and_linears_without_a_mask_are_dense(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    tensors = load_file(model / "model.safetensors")
    tensors[FIRST][:, ::3] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    some = {name: mask for name, mask in masks_of(pruned).items() if "layers.0." in name}
    file = write_masks(tmp_path / "masks" / FILE, some)
    report = convert_to_sparse(str(model), tmp_path / "out", masks=str(file), values="int8")
    layer = CheckpointReader(tmp_path / "out").layer(FIRST.removesuffix(".weight"))
    assert torch.equal(layer.mask, pack_mask(some[FIRST]))
    assert {one.name.split(".")[2] for one in report.left_dense} == {"1"}
    assert len(report.linears) - len(report.left_dense) == len(some)


def test_the_command(
    dense: Path, masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--masks", str(masks), "--output", str(tmp_path / "out")]
    assert main(["convert", str(dense), *options]) == 0
    assert "model.layers.*.mlp.up_proj" in capsys.readouterr().out
    sparse = str(tmp_path / "out")
    for more in (["--values", "int8"], ["--to", "dense"]):
        again = ["convert", sparse, *more, "--masks", str(masks), "--output", f"{sparse}-2"]
        assert main(again) == 2
        assert "--masks are about what is found in a source" in capsys.readouterr().err


def test_a_name_of_the_hub_is_fetched(
    dense: Path, masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, file: str) -> str:
        if (name, file) == ("owner/masks", FILE):
            return str(masks)
        raise OSError("no such repository")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    convert_to_sparse(str(dense), tmp_path / "out", masks="owner/masks", strict=True)
    with pytest.raises(OfflineError, match=r"--masks 'owner/none' is no file .*no such repository"):
        convert_to_sparse(str(dense), tmp_path / "none", masks="owner/none")


def with_entry(name: str, array: numpy.ndarray) -> Callable[[Path], None]:
    return lambda file: numpy.savez_compressed(file, **{name: array})


def cut(file: Path) -> None:
    with_entry(f"{FIRST}.mask", numpy.zeros(2048, numpy.uint8))(file)
    file.write_bytes(file.read_bytes()[:-30])


def flipped(file: Path) -> None:
    """Bytes of the mask itself are others; the directory of the archive is whole."""
    noise = numpy.random.default_rng(0).integers(0, 256, 2048).astype(numpy.uint8)
    with_entry(f"{FIRST}.mask", noise)(file)
    content = bytearray(file.read_bytes())
    content[600:700] = bytes(byte ^ 255 for byte in content[600:700])
    file.write_bytes(content)


def header(shape: str) -> bytes:
    """Of an array of numpy, and a mask."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(2048)


def with_bytes(content: bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{FIRST}.mask.npy", content)

    return write


def empty(file: Path) -> None:
    with zipfile.ZipFile(file, "w"):
        pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text("masks"), "cannot be read as masks"),
        (lambda file: numpy.save(file.open("wb"), numpy.zeros(3)), "cannot be read as masks"),
        (cut, "cannot be read as masks"),
        (flipped, f"the mask of {FIRST} in .* is damaged"),
        (with_bytes(b"masks" * 500), f"the mask of {FIRST} in .* is damaged"),
        (with_bytes(header("(2048,")), f"the mask of {FIRST} in .* is damaged"),
        (with_bytes(header("(2048,)")[:-1]), f"the mask of {FIRST} in .* is damaged"),
        (with_bytes(header("(1125899906842624,)")), r"has uint8 \[1125899906842624\], which is"),
        (empty, "holds nothing: masks are named by their weights"),
        (with_entry("up_proj", numpy.zeros(3)), "holds up_proj: masks are named by their"),
        (
            with_entry("model.layers.7.mlp.up_proj.weight.mask", numpy.zeros(3, numpy.uint8)),
            "are of another model: this one has no model.layers.7.mlp.up_proj.weight",
        ),
        (
            with_entry(f"{FIRST}.mask", numpy.zeros(2047, numpy.uint8)),
            r"the mask of .*q_proj.weight has uint8 \[2047\], which is not a bit for each weight",
        ),
        (with_entry(f"{FIRST}.mask", numpy.zeros(10**6, numpy.uint8)), "has 1000128 bytes"),
        (with_entry(f"{FIRST}.mask", numpy.zeros(512)), r"has float64 \[512\]"),
    ],
)
def test_other_files_are_refused(
    damage: Callable[[Path], None], message: str, dense: Path, tmp_path: Path
) -> None:
    damage(tmp_path / "masks.npz")
    with pytest.raises(OfflineError, match=message):
        convert_to_sparse(str(dense), tmp_path / "out", masks=str(tmp_path / "masks.npz"))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_masks_and_a_model_without_zeros_are_refused(
    dense: Path, pruned: Path, masks: Path, tmp_path: Path
) -> None:
    with pytest.raises(OfflineError, match=f"has no {FILE}: give the folder that has it"):
        convert_to_sparse(str(dense), tmp_path / "out", masks=str(tmp_path))
    write_bitmask(pruned, tmp_path / "bitmask")
    with pytest.raises(OfflineError, match="without its pruned weights: masks are for the dense"):
        convert_to_sparse(str(tmp_path / "bitmask"), tmp_path / "out", masks=str(masks))


def test_masks_of_another_pattern_leave_linears_dense(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    found = masks_of(pruned)
    found[FIRST] = torch.ones_like(found[FIRST])
    file = write_masks(tmp_path / "masks" / FILE, found)
    with pytest.raises(OfflineError, match=r"q_proj keeps 100.0% of its weights, more than 50%"):
        convert_to_sparse(str(dense), tmp_path / "out", masks=str(file), strict=True)
