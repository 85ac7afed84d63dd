"""What a user would serve instead of a sparse model on a CPU: vLLM's own int8 and int4, made here.

Round-to-nearest, in the formats that vLLM's CPU backend runs: enough for speed and memory, which do
not depend on how well the values were chosen.

    python -m benchmarks.engines.quantized_peers int8 DENSE
    python -m benchmarks.engines.quantized_peers int4 DENSE
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines.twins import forget, is_twin, name_parent
from benchmarks.models import SHARD_BYTES
from benchmarks.pruning.commands import ended
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.writer import write_checkpoint

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# compressed-tensors asks how a name begins: without the end `gate_proj` is meant too.
ROUTER = r"re:.*\.mlp\.gate$"
INT4_GROUPS = (128, 64, 32)
SUFFIXES = {"int8": "w8a8", "int4": "int4"}

Rewrite = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


def int4_group(dense: Path) -> int | None:
    """How many values share a scale in the int4 twin; None where no size fits, so without one."""
    hidden = json.loads((dense / "config.json").read_text(encoding="utf-8")).get("hidden_size", 0)
    return next((size for size in INT4_GROUPS if hidden and hidden % size == 0), None)


def int8_config(_: Path) -> dict[str, Any]:
    """Return compressed-tensors' W8A8: int8 channels, dynamic int8 tokens."""
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", ROUTER],
    }


def int4_config(dense: Path) -> dict[str, Any]:
    """Return GPTQ's W4A16, symmetric, groups of 128 where they fit."""
    size = int4_group(dense)
    if size is None:
        raise ValueError(f"{dense.name}: its hidden size is no multiple of {min(INT4_GROUPS)}")
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }


def int8(dense: Path) -> Path:
    """Return the twin that `int8_config` describes."""
    return _rewritten(dense, SUFFIXES["int8"], int8_config(dense), _int8_tensors)


def int4(dense: Path) -> Path:
    """Return the twin that `int4_config` describes."""
    config = int4_config(dense)
    rewrite = partial(_int4_tensors, size=config["group_size"])
    return _rewritten(dense, SUFFIXES["int4"], config, rewrite)


CONFIGS = {"int8": int8_config, "int4": int4_config}
PEERS: dict[str, Callable[[Path], Path]] = {"int8": int8, "int4": int4}


def made_apart(peer: str, dense: Path) -> Path:
    """Return one of `PEERS`, made in a process of its own: engines that are up count this one.

    Raises:
        RuntimeError: it cannot be made; the message is the reason.
    """
    output = _twin(dense, SUFFIXES[peer])
    try:
        made = _is_made(output, dense, CONFIGS[peer](dense))
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    if not made:
        command = [sys.executable, "-m", "benchmarks.engines.quantized_peers", peer, str(dense)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]
            raise RuntimeError(said or ended(f"making {output.name}", done.returncode))
    return output


def _is_made(twin: Path, dense: Path, quantization: dict[str, Any]) -> bool:
    """Tell whether the twin is there, and is what would be made today."""
    if not is_twin(twin, dense):
        return False
    found = json.loads((twin / "config.json").read_text())["quantization_config"]
    return bool(found == quantization)


def _twin(dense: Path, suffix: str) -> Path:
    return dense.with_name(f"{dense.name}-{suffix}")


def _int8_tensors(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    yield f"{name}.weight", (weight.float() / scale).round().to(torch.int8)
    yield f"{name}.weight_scale", scale


def _int4_tensors(name: str, weight: Tensor, size: int) -> Iterator[tuple[str, Tensor]]:
    """Pack [out, in] as GPTQ does: eight input channels in an int32, the lowest bits first."""
    rows, columns = weight.shape
    groups = weight.float().unflatten(1, (-1, size))
    scale = groups.abs().amax(2).clamp_min(1e-8) / 7  # [out, groups]
    codes = (groups / scale.unsqueeze(2)).round().clamp(-8, 7).add(8).flatten(1).to(torch.int32)
    eights = codes.T.reshape(columns // 8, 8, rows)
    packed = torch.zeros(columns // 8, rows, dtype=torch.int32)
    for position in range(8):
        packed |= eights[:, position] << (4 * position)
    zeros = torch.full((columns // size, rows // 8), 0x77777777, dtype=torch.int32)  # 8, less one
    yield f"{name}.qweight", packed
    yield f"{name}.qzeros", zeros
    yield f"{name}.scales", scale.T.contiguous().to(torch.bfloat16)
    yield f"{name}.g_idx", torch.arange(columns, dtype=torch.int32) // size


def _rewritten(dense: Path, suffix: str, quantization: dict[str, Any], rewrite: Rewrite) -> Path:
    """Return the twin beside its dense parent, made once, one file's tensors in memory."""
    output = _twin(dense, suffix)
    if _is_made(output, dense, quantization):
        return output
    unfinished = output.with_name(f"{output.name}.partial")
    write_checkpoint(
        unfinished, _tensors(dense, rewrite), None, dense, force=True, max_shard_bytes=SHARD_BYTES
    )
    config = json.loads((dense / "config.json").read_text())
    (unfinished / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization}, indent=1)
    )
    forget(output)
    unfinished.rename(output)
    name_parent(output, dense)
    return output


def _tensors(dense: Path, rewrite: Rewrite) -> Iterator[tuple[str, Tensor]]:
    reader = CheckpointReader(dense)
    for name in reader.names():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2] in LINEARS:
            yield from rewrite(module, reader.tensor(name))
        else:
            yield name, reader.tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("dense", type=Path, help="dense checkpoint")
    arguments = parser.parse_args()
    print(PEERS[arguments.peer](arguments.dense))


if __name__ == "__main__":
    main()
