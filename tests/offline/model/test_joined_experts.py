"""Dense experts that were read one by one are written as checkpoints of their family have them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from permllm_offline.api import prune
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.joined_experts import joined_experts
from permllm_offline.model.loading import load_model, load_served, open_source
from permllm_offline.model.lookup import family_of
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.families.test_experts import SIZES
from tests.offline.tiny_models import WITH_EXPERTS, as_published, save_tokenizer, tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
MIXTURES = {name: {} for name, one in FAMILIES.items() if one.experts} | dict(WITH_EXPERTS)
JOINED = {name: options for name, options in MIXTURES.items() if FAMILIES[name].joined}
FILE = "model.safetensors"


def save(model_type: str, directory: Path) -> Path:
    model = tiny_model(model_type, **MIXTURES[model_type])
    as_published(model.to(torch.bfloat16)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def separate(directory: Path) -> Iterator[tuple[str, Tensor]]:
    reader = open_source(str(directory)).reader()
    return ((name, reader.tensor(name)) for name in reader.names())


def assert_equal_answers(directory: Path) -> None:
    """In Transformers, with sparse layers, and as a dense model of this package."""
    source = open_source(str(directory))
    with torch.no_grad():
        found, expected = (
            load(source, torch.float32, CPU)(TOKENS).logits for load in (load_served, load_model)
        )
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("model_type", MIXTURES)
def test_what_transformers_writes_comes_out_again(model_type: str, tmp_path: Path) -> None:
    """Byte for byte, and under no other name."""
    directory = save(model_type, tmp_path)
    family = open_source(str(directory)).language.family()
    stored, found = load_file(directory / FILE), dict(joined_experts(separate(directory), family))
    assert found.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.items())
    in_one = [name for name, tensor in stored.items() if "moe" in name or "experts" in name
              if tensor.ndim == 3]  # fmt: skip
    assert len(in_one) == (2 * 2 if family.joined else 0)


def test_no_tensor_waits_but_parts() -> None:
    """Each passes before the next is read, and the last part of a tensor brings it."""
    family = family_of(tiny_model("granitemoe").config)
    experts = "model.layers.0.block_sparse_moe.experts"
    names = ["lm_head.weight", f"{experts}.0.down_proj.weight", f"{experts}.0.up_proj.weight"]
    names += [f"{experts}.{n}.{k}.weight" for n in range(4) for k in ("gate_proj", "down_proj")][2:]
    read: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            read.append(name)
            yield name, torch.zeros(2, 3)

    passed = joined_experts(tensors(), family)
    assert next(passed)[0] == "lm_head.weight"
    assert read == names[:1]
    name, tensor = next(passed)
    assert name == "model.layers.0.block_sparse_moe.output_linear.weight"
    assert tensor.shape == (4, 2, 3)
    assert read == names


def test_a_part_that_never_comes_is_missed() -> None:
    family = family_of(tiny_model("granitemoe").config)
    experts = "model.layers.0.block_sparse_moe.experts"
    tensors = [(f"{experts}.{n}.down_proj.weight", torch.zeros(2, 3)) for n in range(3)]
    with pytest.raises(CheckpointError, match=r"output_linear\.weight: .*1 parts are missing"):
        list(joined_experts(tensors, family))


@pytest.mark.parametrize("model_type", JOINED)
def test_experts_left_dense_are_as_they_were(
    model_type: str, tmp_path: Path, text_file: Path
) -> None:
    """All of them, or those of a layer."""
    source = save(model_type, tmp_path / "model")
    stored = load_file(source / FILE)
    in_one = {name for name, tensor in stored.items() if tensor.ndim == 3 and "conv" not in name}
    second = {name for name in in_one if ".layers.1." in name}
    for layers, expected in (("", in_one), (r"layers\.1\.", second)):
        output = tmp_path / f"sparse{len(expected)}"
        ignore = [rf"re:.*{layers}.*\.?experts\..*"]
        prune(source, output, dataset=text_file, method="wanda+cp", ignore=ignore, **SIZES)
        assert validate(output) == []
        written = load_file(output / FILE)
        assert in_one & written.keys() == expected
        assert all(torch.equal(written[name], stored[name]) for name in expected)
        assert_equal_answers(output)


@pytest.mark.parametrize("model_type", JOINED)
def test_experts_that_do_not_fit_stay_joined(
    model_type: str, tmp_path: Path, text_file: Path
) -> None:
    """One of a layer that is dense keeps the others so, in the two tensors of the layer."""
    source = save(model_type, tmp_path / "model")
    prune(source, tmp_path / "sparse", dataset=text_file, method="magnitude", **SIZES)
    convert_to_dense(str(tmp_path / "sparse"), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    down = next(tensor for name, tensor in model.named_parameters()
                if "layers.1." in name and name.endswith("experts.down_proj"))  # fmt: skip
    with torch.no_grad():
        down[3] += 1
    model.save_pretrained(tmp_path / "dense")
    convert_to_sparse(str(tmp_path / "dense"), tmp_path / "again")
    assert validate(tmp_path / "again") == []
    names = CheckpointReader(tmp_path / "again").sparse_layers()
    assert any("layers.0." in name and "experts.3" in name for name in names)
    assert not any("layers.1." in name and "experts." in name for name in names)
    assert_equal_answers(tmp_path / "again")
