"""Masks that were published apart from their model, in MaskLLM's form, are applied to it."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from permllm_offline.cli import main
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import (
    in_place,
    is_linear,
    prune,
    same_weights,
    write_bitmask,
)
from tests.offline.scaled_models import FORMS, write_scaled

FILE = "mask_compressed.npz"
FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(dense, tmp_path_factory.mktemp("pruned") / "plain", in_place)


def masks_of(pruned: Path) -> dict[str, Tensor]:
    tensors = load_file(pruned / "model.safetensors")
    return {name: tensor != 0 for name, tensor in tensors.items() if is_linear(name)}


def write(file: Path, masks: Mapping[str, Tensor]) -> Path:
    """As MaskLLM's `tool_compress_mask.py` does."""
    file.parent.mkdir(exist_ok=True)
    packed = {f"{name}.mask": numpy.packbits(mask.numpy()) for name, mask in masks.items()}
    numpy.savez_compressed(file, **packed)
    return file


@pytest.fixture(scope="module")
def masks(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("masks") / FILE, masks_of(pruned))


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
    some = {name: mask for name, mask in masks_of(pruned).items() if "layers.0." in name}
    file = write(tmp_path / "masks" / FILE, some)
    report = convert_to_sparse(str(dense), tmp_path / "out", masks=str(file), int8=True)
    assert {one.name.split(".")[2] for one in report.left_dense} == {"1"}
    assert len(report.linears) - len(report.left_dense) == len(some)


def test_models_in_8_bits_take_masks(pruned: Path, dense: Path, tmp_path: Path) -> None:
    write_scaled(dense, tmp_path / "scaled", tmp_path / "back", FORMS["channel"])
    file = write(tmp_path / "masks" / FILE, masks_of(pruned))
    for name in ("scaled", "back"):
        convert_to_sparse(str(tmp_path / name), tmp_path / f"{name} out", masks=str(file))
    assert same_weights(tmp_path / "scaled out", tmp_path / "back out")


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
        (empty, "holds nothing: masks are named by their weights"),
        (with_entry("up_proj", numpy.zeros(3)), "holds up_proj: masks are named by their"),
        (
            with_entry("model.layers.7.mlp.up_proj.weight.mask", numpy.zeros(3, numpy.uint8)),
            "are of another model: this one has no model.layers.7.mlp.up_proj.weight",
        ),
        (
            with_entry(f"{FIRST}.mask", numpy.zeros(2047, numpy.uint8)),
            r"the mask of .*q_proj.weight has 2047 numbers of uint8, which is not a bit for each w",
        ),
        (with_entry(f"{FIRST}.mask", numpy.zeros(10**6, numpy.uint8)), "has 1000128 bytes"),
        (with_entry(f"{FIRST}.mask", numpy.zeros(512)), "has 512 numbers of float64"),
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
    file = write(tmp_path / "masks" / FILE, found)
    with pytest.raises(OfflineError, match=r"q_proj keeps 100.0% of its weights, more than 50%"):
        convert_to_sparse(str(dense), tmp_path / "out", masks=str(file), strict=True)
