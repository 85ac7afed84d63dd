"""vLLM's own int8 and int4: what is written is the dense weight, rounded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

from benchmarks.engines import quantized_peers
from benchmarks.engines.quantized_peers import ROUTER, int4, int4_group, int8, made_apart

LINEAR = "model.layers.0.mlp.down_proj"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "vocab_size": 8}))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{LINEAR}.weight": torch.randn((16, 64), generator=generator).bfloat16(),
        "lm_head.weight": torch.randn((8, 64), generator=generator).bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rewritten(dense: Path, twin: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    before = load_file(dense / "model.safetensors")
    after = load_file(twin / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    config = json.loads((twin / "config.json").read_text())
    assert config["hidden_size"] == 64
    return before[f"{LINEAR}.weight"].float(), after, config["quantization_config"]


def test_int8_has_a_scale_for_every_row(dense: Path) -> None:
    weight, after, config = rewritten(dense, int8(dense))
    values, scale = after[f"{LINEAR}.weight"], after[f"{LINEAR}.weight_scale"]
    assert values.dtype == torch.int8
    assert values.abs().amax(1).tolist() == [127] * 16
    assert ((values * scale - weight).abs() <= scale * 0.501).all()
    assert config["ignore"] == ["lm_head", ROUTER]


def test_the_router_alone_is_ignored() -> None:
    """As vLLM decides, for whom `re:` matches from the start of a name, wherever that ends."""
    fused = {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert should_ignore_layer("model.layers.0.mlp.gate", [ROUTER], fused)
    for name in ("gate_up_proj", "gate_proj", "down_proj"):
        assert not should_ignore_layer(f"model.layers.0.mlp.{name}", [ROUTER], fused)


def test_int4_packs_eight_inputs_in_a_number(dense: Path) -> None:
    weight, after, config = rewritten(dense, int4(dense))
    assert (config["bits"], config["group_size"]) == (4, 64)
    packed, scales = after[f"{LINEAR}.qweight"], after[f"{LINEAR}.scales"].float()
    assert (packed.shape, scales.shape) == ((8, 16), (1, 16))
    for column in range(64):
        for row in range(16):
            code = (int(packed[column // 8, row]) >> (4 * (column % 8))) & 15
            found = (code - 8) * float(scales[0, row])
            assert abs(found - float(weight[row, column])) <= float(scales[0, row]) * 0.55
    # GPTQ stores zeros less one
    assert after[f"{LINEAR}.qzeros"].flatten().tolist() == [0x77777777] * 2
    assert after[f"{LINEAR}.g_idx"].tolist() == [0] * 64


def test_a_twin_is_made_once(dense: Path) -> None:
    twin = int8(dense)
    (twin / "mark").touch()
    assert int8(dense) == twin
    assert (twin / "mark").exists()


def test_a_twin_of_another_format_is_made_anew(dense: Path) -> None:
    twin = int8(dense)
    config = json.loads((twin / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (twin / "config.json").write_text(json.dumps(config))
    (twin / "mark").touch()
    assert made_apart("int8", dense) == twin
    assert not (twin / "mark").exists()


@pytest.mark.parametrize("changed", ["weights", "no record"])
def test_a_twin_of_another_model_is_made_anew(dense: Path, changed: str) -> None:
    twin = int8(dense)
    (twin / "mark").touch()
    if changed == "weights":
        save_file({f"{LINEAR}.weight": torch.ones(16, 64)}, dense / "model.safetensors")
    else:
        twin.with_name(f"{twin.name}.parent.json").unlink()
    assert made_apart("int8", dense) == twin
    assert not (twin / "mark").exists()
    (twin / "mark").touch()
    assert int8(dense) == twin
    assert (twin / "mark").exists()


def test_a_twin_is_made_in_another_process(dense: Path) -> None:
    twin = made_apart("int8", dense)
    made = load_file(twin / "model.safetensors")
    again = load_file(int8(dense.rename(dense.with_name("again"))) / "model.safetensors")
    assert all(torch.equal(made[name], again[name]) for name in made.keys() | again.keys())
    (dense.with_name("again") / "config.json").write_text(json.dumps({"hidden_size": 40}))
    with pytest.raises(RuntimeError, match=r"again: .*no multiple of 32"):
        made_apart("int4", dense.with_name("again"))


def test_a_twin_whose_process_is_killed_says_so(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = SimpleNamespace(returncode=-9, stderr="")
    monkeypatch.setattr(quantized_peers.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(RuntimeError, match=r"making model-w8a8 was killed by SIGKILL: is there"):
        made_apart("int8", dense)


@pytest.mark.parametrize(("hidden", "group"), [(2048, 128), (576, 64), (96, 32), (40, None)])
def test_the_group_is_the_largest_that_fits(dense: Path, hidden: int, group: int | None) -> None:
    (dense / "config.json").write_text(json.dumps({"hidden_size": hidden}))
    assert int4_group(dense) == group
    if group is None:
        with pytest.raises(ValueError, match="no multiple of 32"):
            int4(dense)
