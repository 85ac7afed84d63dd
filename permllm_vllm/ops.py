"""The operator that multiplies with a packed weight, `torch.ops.permllm.sparse_linear`.

Defined here with its shape function and its plain PyTorch implementation; the compiled libraries,
where they were built, add those for the CPU and for CUDA. So are `permute_inputs`, which only the
one for CUDA implements, and `sparse_experts` and the norms, which only the one for the CPU does.
What `packed` and `metadata` hold is the business of the
backend that packed (`permllm_vllm.backends`).
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_LIBRARY_FILE = Path(__file__).with_name("_C.so")
_CUDA_LIBRARY_FILE = Path(__file__).with_name("_C_cuda.so")
_library = torch.library.Library("permllm", "DEF")
_library.define(
    "sparse_linear(Tensor x, Tensor packed, Tensor? metadata, Tensor? permutation, Tensor? scale, "
    "Tensor? bias, SymInt out_features, str pattern) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sparse_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up, "
    "Tensor gate_up_metadata, Tensor? gate_up_permutation, Tensor? gate_up_scale, Tensor down, "
    "Tensor down_metadata, Tensor? down_permutation, Tensor? down_scale, "
    "SymInt intermediate_size, int activation=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "permute_inputs(Tensor x, Tensor permutation) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    "rms_norm(Tensor x, Tensor? weight, float epsilon) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "add_rms_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, float epsilon) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _reference_linear(
    x: Tensor,
    packed: Tensor,
    metadata: Tensor | None,
    permutation: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    pattern: str,
) -> Tensor:
    if not packed.is_floating_point():
        raise ValueError(
            f"packed is {packed.dtype} on {x.device}, which only a compiled kernel reads: pack "
            "with the backend that select_backend returns for this device"
        )
    return torch.nn.functional.linear(x, packed, bias)


def _fake_linear(
    x: Tensor,
    packed: Tensor,
    metadata: Tensor | None,
    permutation: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    pattern: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_permute(x: Tensor, permutation: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_library.define(
    "head_linear(Tensor x, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _fake_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_sum_norm(x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
    return None


def _fake_head(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_experts(x: Tensor, *operands: Tensor | int | None) -> Tensor:
    return x.new_empty(x.shape)


_library.impl("head_linear", torch.nn.functional.linear, "CompositeExplicitAutograd")
torch.library.register_fake("permllm::head_linear", _fake_head, lib=_library)
_library.impl("sparse_linear", _reference_linear, "CompositeExplicitAutograd")
torch.library.register_fake("permllm::sparse_linear", _fake_linear, lib=_library)
torch.library.register_fake("permllm::sparse_experts", _fake_experts, lib=_library)
torch.library.register_fake("permllm::permute_inputs", _fake_permute, lib=_library)
torch.library.register_fake("permllm::rms_norm", _fake_norm, lib=_library)
torch.library.register_fake("permllm::add_rms_norm_", _fake_sum_norm, lib=_library)


def _load_library(file: Path, tools: str, options: str = "") -> str:
    """Loads compiled kernels; returns why they are missing, or an empty string."""
    if not file.exists() and (sources := file.parents[1] / "setup.py").exists():
        return (
            f"{file.name} was not built in {sources.parent}, whose sources Python imports: start "
            f"it in another folder if they are installed, else install {tools}, then, there: "
            f"{options}pip install --no-deps --no-build-isolation --editable ."
        )
    if not file.exists():
        return (
            f"{file.name} was not built: install {tools}, then, in the source repository: "
            f"{options}pip install --no-deps --no-build-isolation --force-reinstall ."
        )
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"{file.name} does not load with torch {torch.__version__}: {error}"
    return ""


#: Why the compiled CPU kernels are missing, empty when they are loaded.
missing_reason = _load_library(_LIBRARY_FILE, "a C++ compiler")
if missing_reason:
    logger.debug("permllm kernels: %s", missing_reason)

#: Why the compiled CUDA kernels are missing, empty when they are loaded. They load without a GPU.
cuda_missing_reason = _load_library(
    _CUDA_LIBRARY_FILE, "the CUDA toolkit and nvidia-cutlass", "PERMLLM_BUILD_CUDA=1 "
)
if cuda_missing_reason:
    logger.debug("permllm CUDA kernels: %s", cuda_missing_reason)


def sparse_linear(
    x: Tensor,
    packed: Tensor,
    metadata: Tensor | None,
    permutation: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    pattern: str,
) -> Tensor:
    """Multiplies activations with a packed N:M sparse weight, or a dense one in 12 bits.

    Args:
        x: activations `[..., in]`, in the original input order, any strides.
        packed, metadata, permutation, scale: the fields of a backend's `PackedWeights`.
        bias: `[out]` in the dtype of `x`, or None.
        out_features: rows of the weight.
        pattern: "2:4" or "4:8"; of a dense weight any.

    Returns:
        `x @ W.T + bias`, `[..., out]` in the dtype of `x`.

    Raises:
        RuntimeError: a shape or dtype does not fit, or `packed` is not what its metadata describe.
    """
    return torch.ops.permllm.sparse_linear(
        x, packed, metadata, permutation, scale, bias, out_features, pattern
    )
