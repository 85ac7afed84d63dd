import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from permllm_vllm.checkpoint.validation import Problem, validate

LAYERS = "model.layers"
UP, DOWN = f"{LAYERS}.0.mlp.up_proj", f"{LAYERS}.0.mlp.down_proj"
SHARD_BYTES = 20_000


@pytest.fixture
def checkpoint(tiny_model: Any, tmp_path: Path) -> Path:
    return tiny_model.write(tmp_path / "out", max_shard_bytes=SHARD_BYTES)


def shown(problems: list[Problem]) -> list[str]:
    return [str(problem) for problem in problems]


def edit_tensor(checkpoint: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    path = checkpoint / index["weight_map"][name]
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors[name])
    save_file(tensors, path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "int4"])
def test_what_the_writer_writes_is_valid(
    make_tiny_model: Callable[[str, str], Any], tmp_path: Path, pattern: str, dtype: str
) -> None:
    assert validate(make_tiny_model(pattern, dtype).write(tmp_path / "out")) == []


def swap_in_group(permutation: torch.Tensor) -> None:
    permutation[:2] = permutation[[1, 0]]


def swap_groups(permutation: torch.Tensor) -> None:
    permutation[:8] = permutation[[4, 5, 6, 7, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (
            f"{UP}.weight_mask",
            lambda mask: mask[3].fill_(0b01110011),
            "found 3 bits in row 3, group 1 (8 such groups); rule: every group keeps exactly 2",
        ),
        (
            f"{DOWN}.folded_permutation",
            lambda permutation: permutation[40].fill_(int(permutation[41])),
            "found no bijection in block 1; rule: every block holds each of 0 .. 31 once",
        ),
        (f"{UP}.input_permutation", lambda p: p[0].fill_(200), "found no bijection in block 0"),
        (f"{UP}.input_permutation", swap_in_group, "found another order; rule: canonical form"),
        (f"{UP}.input_permutation", swap_groups, "found another order; rule: canonical form"),
        (f"{UP}.weight_packed", lambda v: v[0, 0].fill_(float("nan")), "found inf or nan"),
        (f"{UP}.bias", lambda bias: bias[0].fill_(float("inf")), "found inf or nan"),
    ],
)
def test_bad_contents_are_reported(
    checkpoint: Path, name: str, change: Callable[[torch.Tensor], Any], expected: str
) -> None:
    edit_tensor(checkpoint, name, change)
    problems = shown(validate(checkpoint))
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}: ")
    assert expected in problems[0]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_reported(
    make_tiny_model: Callable[[str, str], Any], tmp_path: Path, scale: float
) -> None:
    output = make_tiny_model("2:4", "int8").write(tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    edit_tensor(output, f"{UP}.weight_scale", lambda scales: scales[5].fill_(scale))
    expected = f"{UP}.weight_scale: found {scale}; rule: finite and above 0"
    assert shown(validate(output))[0].startswith(expected)


@pytest.mark.parametrize("multiplier", [0, 17])
def test_bad_multipliers_are_reported(
    make_tiny_model: Callable[[str, str], Any], tmp_path: Path, multiplier: int
) -> None:
    output = make_tiny_model("2:4", "int4").write(tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    edit_tensor(output, f"{UP}.weight_multiplier", lambda found: found[5].fill_(multiplier))
    edit_tensor(output, f"{UP}.weight_scale", lambda scales: scales[5].fill_(-1))
    scale, found = shown(validate(output))
    assert scale.startswith(f"{UP}.weight_scale: found -1.0")
    assert found.startswith(f"{UP}.weight_multiplier: found {multiplier}; rule: 1 to 16")


def test_every_problem_is_reported_at_once(checkpoint: Path) -> None:
    edit_tensor(checkpoint, f"{UP}.weight_mask", lambda mask: mask[0, 0].fill_(0))
    edit_tensor(checkpoint, f"{UP}.input_permutation", lambda p: p.fill_(0))
    edit_tensor(checkpoint, f"{DOWN}.weight_mask", lambda mask: mask[0, 0].fill_(255))
    edit_json(checkpoint / "config.json", lambda c: c["quantization_config"]["folded"].pop())
    (checkpoint / "stray.safetensors").touch()
    tensors = [problem.tensor for problem in validate(checkpoint)]
    assert sorted(tensors) == sorted(
        [
            "stray.safetensors",
            f"{LAYERS}.1.mlp.down_proj.folded_permutation",
            f"{UP}.weight_mask",
            f"{UP}.input_permutation",
            f"{DOWN}.weight_mask",
        ]
    )


def test_a_bad_configuration_is_reported_with_the_files(checkpoint: Path) -> None:
    def spoil(config: dict[str, Any]) -> None:
        config["quantization_config"].update(block_size=5, colour="red")

    edit_json(checkpoint / "config.json", spoil)
    first = sorted(checkpoint.glob("*.safetensors"))[0]
    first.unlink()
    problems = shown(validate(checkpoint))
    assert any("block_size: found 5" in problem for problem in problems)
    assert any("colour: found 'red'" in problem for problem in problems)
    assert any(first.name in problem for problem in problems)


def test_a_dense_checkpoint_is_told_what_to_do(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.pop("quantization_config"))
    (problem,) = validate(checkpoint)
    assert "permllm-offline prune" in problem.remedy


@pytest.mark.parametrize("broken", ["truncated", "absent", "garbage"])
def test_an_unreadable_shard_is_reported_once(checkpoint: Path, broken: str) -> None:
    path = sorted(checkpoint.glob("*.safetensors"))[1]
    if broken == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if broken == "truncated" else b"no tensors here")
    (problem,) = validate(checkpoint)
    assert problem.tensor == str(path)
    assert problem.rule == "a whole safetensors file"


def test_an_index_that_disagrees_is_reported(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    moved = next(name for name, file in weight_map.items() if file == first)
    edit_json(index, lambda content: content["weight_map"].update({moved: second}))
    problems = shown(validate(checkpoint))
    assert any(p.startswith(f"{moved}: found nothing in {second}") for p in problems)
    assert any(p.startswith(f"{moved}: found a tensor in {first}") for p in problems)


def test_doubled_tensors_are_reported(checkpoint: Path) -> None:
    paths = sorted(checkpoint.glob("*.safetensors"))
    doubled, tensor = next(iter(load_file(paths[0]).items()))
    save_file({**load_file(paths[1]), doubled: tensor}, paths[1])
    (problem,) = validate(checkpoint)
    assert problem.tensor == doubled
    assert "exactly one file" in problem.rule

    (checkpoint / "model.safetensors").write_bytes(paths[0].read_bytes())
    assert [p.tensor for p in validate(checkpoint)] == [doubled, "model.safetensors"]


def test_a_tensor_that_the_index_leaves_out_is_reported(checkpoint: Path) -> None:
    def forget(content: dict[str, Any]) -> None:
        del content["weight_map"]["model.norm.weight"]

    edit_json(checkpoint / "model.safetensors.index.json", forget)
    (problem,) = validate(checkpoint)
    assert problem.tensor == "model.norm.weight"
    assert "leaves it out" in problem.rule


def test_path_traversal_is_reported(checkpoint: Path) -> None:
    def escape(content: dict[str, Any]) -> None:
        content["weight_map"]["model.norm.weight"] = "../../secret.safetensors"

    edit_json(checkpoint / "model.safetensors.index.json", escape)
    (problem,) = validate(checkpoint)
    assert "'../../secret.safetensors'" in problem.value


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    problems = validate(tmp_path / "absent")
    assert [Path(problem.tensor).name for problem in problems] == ["config.json", "absent"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_never_raise(checkpoint: Path, data: st.DataObject) -> None:
    damaged = checkpoint.with_name("damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(checkpoint, damaged)
    path = damaged / data.draw(st.sampled_from(sorted(path.name for path in damaged.iterdir())))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, min(len(content), 2000) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert all(isinstance(problem, Problem) for problem in validate(damaged))
