"""Judge a whole checkpoint directory: every broken rule, none raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

import torch

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, CheckpointError, Problem
from permllm_vllm.checkpoint.headers import WRITE_AGAIN, TensorHeader, checkpoint_problems
from permllm_vllm.checkpoint.layer import SparseLayer
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import canonical, is_bijective
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import (
    FOLDED_PERMUTATION,
    INPUT_PERMUTATION,
    QuantizationConfig,
)
from permllm_vllm.checkpoint.shards import (
    CONFIG_NAME,
    INDEX_NAME,
    read_headers,
    read_json,
    read_weight_map,
)

__all__ = ["Problem", "validate"]


def validate(
    directory: str | PathLike[str], track: Callable[[list[str]], Iterable[str]] = iter
) -> list[Problem]:
    """List every rule of the format that a checkpoint directory breaks; empty when it is valid.

    Reads every sparse tensor once, one layer in memory at a time; `track` passes on the names of
    the layers, to show progress. Bad content is reported, never raised.
    """
    directory = Path(directory)
    quantization, problems = _read_quantization(directory)
    try:
        weight_map = read_weight_map(directory)
    except CheckpointError as error:
        return problems + error.problems
    headers, file_problems = _read_files(directory, weight_map)
    problems += file_problems
    if quantization is None:
        return problems
    # What an unreadable file holds is unknown, and nobody learns from "missing" in addition.
    unknown = {name.rpartition(".")[0] for name in weight_map if name not in headers}
    problems += [
        problem
        for problem in checkpoint_problems(headers, quantization)
        if problem.tensor.rpartition(".")[0] not in unknown
    ]
    reader = CheckpointReader(directory)
    for module in track(reader.sparse_layers()):
        try:
            layer = reader.layer(module)
        except CheckpointError:
            continue  # its file or its headers are reported already
        problems += _layer_content_problems(layer, quantization)
    return problems


def _read_quantization(directory: Path) -> tuple[QuantizationConfig | None, list[Problem]]:
    try:
        config = read_json(directory / CONFIG_NAME)
        if config.get("quantization_config") is None:
            rule = "config.json has a quantization_config with quant_method permllm"
            remedy = "this checkpoint is dense: prune it with `permllm-offline prune`"
            return None, [Problem(CONFIG_NAME, "no quantization_config", rule, remedy)]
        return QuantizationConfig.from_dict(config["quantization_config"]), []
    except CheckpointError as error:
        return None, error.problems


def _read_files(
    directory: Path, weight_map: dict[str, str]
) -> tuple[dict[str, TensorHeader], list[Problem]]:
    """Read the headers of every file and hold them against the index."""
    headers: dict[str, TensorHeader] = {}
    problems: list[Problem] = []
    for file in sorted(set(weight_map.values())):
        try:
            found = read_headers(directory / file)
        except CheckpointError as error:
            problems += error.problems
            continue
        expected = {name for name, place in weight_map.items() if place == file}
        for name in sorted(expected - found.keys()):
            rule = f"{INDEX_NAME} puts it there"
            problems.append(Problem(name, f"nothing in {file}", rule, FETCH_AGAIN))
        for name in sorted(found.keys() - expected):
            rule = f"{INDEX_NAME} puts every stored tensor into exactly one file"
            place = f"and says {weight_map[name]}" if name in weight_map else "and leaves it out"
            problems.append(Problem(name, f"a tensor in {file}", f"{rule}, {place}", FETCH_AGAIN))
        headers.update({name: found[name] for name in expected & found.keys()})
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in weight_map.values():
            rule = f"every safetensors file is named by {INDEX_NAME}, else tensors may be doubled"
            problems.append(Problem(path.name, "a file of no use", rule, "remove the file"))
    return headers, problems


def _layer_content_problems(layer: SparseLayer, quantization: QuantizationConfig) -> list[Problem]:
    pattern, block = Pattern.parse(quantization.pattern), quantization.block_size
    problems = layer.content_problems(pattern, block)
    for kind, permutation in (
        (INPUT_PERMUTATION, layer.input_permutation),
        (FOLDED_PERMUTATION, layer.folded_permutation),
    ):
        if permutation is None or not is_bijective(permutation, block):
            continue
        if not torch.equal(permutation, canonical(permutation, block, pattern)):
            rule = (
                "canonical form: channels ascend in a group, groups ascend by smallest channel in "
                "a block"
            )
            problems.append(Problem(f"{layer.name}.{kind}", "another order", rule, WRITE_AGAIN))
    return problems
