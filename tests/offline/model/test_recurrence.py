"""What recurrences keep for a backward pass is counted without computing, and forecast."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from permllm_offline.model.loading import open_source
from permllm_offline.model.lookup import family_of
from permllm_offline.model.modules import decoder_layers
from permllm_offline.model.prune_plan import between_bytes, make_plan
from permllm_offline.model.recomputation import activation_bytes
from permllm_offline.model.recurrence import kept_bytes
from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.tiny_models import tiny_model

TOKENS, CHANNELS = 512, 128


def kept_while_computing(module: torch.nn.Module, dtype: torch.dtype) -> float:
    """Bytes for each token of a real pass."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    module.to(dtype)
    states = torch.randn(1, TOKENS, CHANNELS, dtype=dtype, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        module(states)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes = [one.untyped_storage().nbytes() for at, one in kept.items() if at not in own]
    return sum(sizes) / TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_is_what_is_kept(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3_5_text")
    family = family_of(model.config)
    module = decoder_layers(model, family.layers)[0].get_submodule(family.recurrent_module)
    expected = kept_while_computing(module, dtype)
    counted = kept_bytes(module.to("meta"), CHANNELS, dtype)
    assert counted == pytest.approx(expected, rel=0.01)


def test_a_kernel_that_takes_no_such_tensors_counts_nothing() -> None:
    assert kept_bytes(torch.nn.Linear(2, 2, device="meta"), CHANNELS, torch.float32) == 0


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "llama"])
def test_a_plan_counts_each_once(model_type: str, tmp_path: Path) -> None:
    recurrent = model_type == "qwen3_5_text"
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    pattern, dtype = Pattern(2, 4), torch.bfloat16
    plan = make_plan(open_source(str(tmp_path)), pattern, 64, permuted=True, dtype=dtype)
    beside = [sum(one.kept_beside for one in linears) for linears in plan.all_by_layer]
    assert [kept > 0 for kept in beside] == [recurrent, False]
    found = activation_bytes(plan.every_linear, TOKENS, 2) / TOKENS
    assert found == pytest.approx(between_bytes(plan.every_linear, 2) + sum(beside), abs=1)
    if recurrent:
        first = decoder_layers(model, plan.family.layers)[0]
        module = first.get_submodule(plan.family.recurrent_module)
        assert found > kept_while_computing(module, dtype)
