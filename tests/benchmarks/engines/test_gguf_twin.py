"""A checkpoint as llama.cpp reads it: every weight, named and ordered as its `llama` wants."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.engines import gguf_twin as module
from benchmarks.engines.gguf_twin import FILE, gguf_twin, pairs_together
from permllm_vllm.checkpoint.reader import CheckpointReader
from tests.offline.tiny_models import tiny_model

QUANTIZE = Path("llama-quantize")
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    return folder


def values(tensor: gguf.ReaderTensor) -> Tensor:
    """Of a tensor of a GGUF file, in float32."""
    found = torch.from_numpy(np.array(tensor.data))
    bfloat16 = tensor.tensor_type == gguf.GGMLQuantizationType.BF16
    return found.view(torch.bfloat16).float() if bfloat16 else found


def test_all_of_a_checkpoint_is_in_the_file(dense: Path) -> None:
    twin = gguf_twin(dense, "BF16", QUANTIZE)
    reader, found = CheckpointReader(dense), gguf.GGUFReader(twin / FILE)
    tensors = {one.name: one for one in found.tensors}
    assert len(tensors) == len(list(reader.names()))
    for name, original in TENSORS.items():
        expected = reader.tensor(original).float()
        assert torch.equal(values(tensors[name]), expected), name
        matrix = tensors[name].tensor_type == gguf.GGMLQuantizationType.BF16
        assert matrix == (expected.dim() > 1)
    config = json.loads((dense / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for letter, count in heads.items():
        original = reader.tensor(f"model.layers.0.self_attn.{letter}_proj.weight").float()
        order = [
            head * len(original) // count + half * len(original) // count // 2 + channel
            for head in range(count)
            for channel in range(len(original) // count // 2)
            for half in range(2)
        ]
        assert torch.equal(values(tensors[f"blk.0.attn_{letter}.weight"]), original[order])
    said = {name: field.contents() for name, field in found.fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["llama.block_count"] == 2
    assert said["llama.attention.head_count"] == heads["q"]
    assert said["llama.attention.head_count_kv"] == heads["k"]
    assert said["llama.rope.freq_base"] == 10000
    assert said["tokenizer.ggml.model"] == "no_vocab"


@given(
    heads=st.integers(1, 4), half=st.integers(1, 4), position=st.integers(0, 50), seed=st.integers()
)
def test_turned_neighbours_are_turned_halves(
    heads: int, half: int, position: int, seed: int
) -> None:
    """Scores of queries and keys are the same, so it is the same model."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    query, key = torch.randn((2, heads * 2 * half), generator=generator, dtype=torch.float64)
    angles = position * 10.0 ** -torch.arange(half, dtype=torch.float64)

    def halves(vector: Tensor) -> Tensor:
        first, second = vector.view(heads, 2, half).unbind(1)
        turned = first * angles.cos() - second * angles.sin()
        return torch.cat([turned, second * angles.cos() + first * angles.sin()], 1)

    def neighbours(vector: Tensor) -> Tensor:
        pairs = torch.view_as_complex(pairs_together(vector, heads).view(heads, half, 2))
        return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(1)

    expected = (halves(query) * key.view(heads, -1)).sum(1)
    plain_key = pairs_together(key, heads).view(heads, -1)
    assert torch.allclose((neighbours(query) * plain_key).sum(1), expected, atol=1e-12)


def test_a_twin_is_made_once_of_each_parent(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = gguf_twin(dense, "BF16", QUANTIZE)
    monkeypatch.setattr(module, "write_gguf", lambda *arguments: pytest.fail("made again"))
    assert gguf_twin(dense, "BF16", QUANTIZE) == twin
    monkeypatch.undo()
    shutil.rmtree(dense)
    tiny_model("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(dense)
    gguf_twin(dense, "BF16", QUANTIZE)
    assert not any("blk.1." in one.name for one in gguf.GGUFReader(twin / FILE).tensors)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("qwen3", {}, "this is qwen3$"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "this is llama .*linear",
        ),
    ],
)
def test_another_model_is_refused(
    kind: str, options: dict[str, object], said: str, tmp_path: Path
) -> None:
    tiny_model(kind, **options).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"other: llama.cpp is compared with .*{said}"):
        gguf_twin(tmp_path / "other", "BF16", QUANTIZE)


def test_a_program_that_fails_says_why(dense: Path, tmp_path: Path) -> None:
    failing = tmp_path / "llama-quantize"
    failing.write_text("#!/bin/sh\necho loading\necho no such type >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"^llama-quantize ended with status 3: loading$"):
        gguf_twin(dense, "Q8_0", failing)
