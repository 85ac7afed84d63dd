"""Which norms the kernel takes, and that it does not stand in a user's way."""

import sys
from collections.abc import Iterator
from subprocess import run

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from permllm_vllm import ops
from permllm_vllm.compat import fused_add_rms_norm, rms_norm
from permllm_vllm.vllm_workarounds.norms import PROVIDER, PYTORCH, normalize_by_kernel

OPERATIONS = (rms_norm, fused_add_rms_norm)
needs_kernel = pytest.mark.skipif(
    bool(ops.missing_reason) or not torch.ops.permllm.cpu_has_norm(),
    reason=ops.missing_reason or "this instruction set has no kernel for norms",
)


@pytest.fixture(autouse=True)
def as_vllm_sets_it() -> Iterator[None]:
    before = [operation.get_priority() for operation in OPERATIONS]
    for operation in OPERATIONS:
        operation.set_default([PYTORCH])
    yield
    for operation, priority in zip(OPERATIONS, before, strict=True):
        operation.set_default(priority or [PYTORCH])


def test_vllm_still_has_no_kernel_for_norms_on_cpus() -> None:
    """Once this fails, vLLM has one: measure whether `vllm_workarounds/norms.py` is still worth it.

    In a process of its own, in which nothing of ours is registered.
    """
    lines = (
        "from vllm.ir.ops import fused_add_rms_norm, rms_norm",
        "from vllm.platforms import current_platform",
        "current_platform.import_ir_kernels()",
        "print([[n for n, one in op.impls.items() if one.supported] "
        "for op in (rms_norm, fused_add_rms_norm)])",
    )
    found = run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True)
    assert found.stdout.splitlines()[-1:] == [str([[PYTORCH]] * 2)], found.stderr


@needs_kernel
def test_an_eager_engine_has_the_kernel_and_a_compiled_one_has_inductor() -> None:
    normalize_by_kernel(eager=False)
    assert [one.get_priority() for one in OPERATIONS] == [[PYTORCH]] * 2
    normalize_by_kernel(eager=True)
    normalize_by_kernel(eager=True)
    assert [one.get_priority() for one in OPERATIONS] == [[PROVIDER, PYTORCH]] * 2


@needs_kernel
def test_what_a_user_named_stays() -> None:
    rms_norm.set_default([PROVIDER])
    fused_add_rms_norm.set_default([PROVIDER])
    before = [one.get_priority() for one in OPERATIONS]
    normalize_by_kernel(eager=True)
    assert [one.get_priority() for one in OPERATIONS] == before


def test_without_a_kernel_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "missing_reason", "was not built")
    normalize_by_kernel(eager=True)
    assert [one.get_priority() for one in OPERATIONS] == [[PYTORCH]] * 2


@needs_kernel
def test_each_call_goes_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    normalize_by_kernel(eager=True)
    x, residual = torch.randn(2, 6, 64).bfloat16()
    weight = torch.randn(64).bfloat16()

    def provider(operation: object, *operands: object) -> str:
        return str(operation.dispatch(*operands).provider)  # type: ignore[attr-defined]

    assert provider(rms_norm, x, weight, 1e-6) == PROVIDER
    assert provider(rms_norm, x, weight.float(), 1e-6) == PROVIDER  # as Gemma's are
    assert provider(rms_norm, x, None, 1e-6) == PROVIDER
    assert provider(rms_norm, x[:, ::2], weight[::2].contiguous(), 1e-6) == PROVIDER
    assert provider(rms_norm, x, weight, 1e-6, 32) == PYTORCH
    assert provider(rms_norm, x.float(), weight, 1e-6) == PYTORCH
    assert provider(fused_add_rms_norm, x, residual, weight, 1e-6) == PROVIDER
    assert provider(fused_add_rms_norm, x[:, ::2], residual[:, ::2], None, 1e-6) == PYTORCH
    assert provider(fused_add_rms_norm, x, residual.float(), weight, 1e-6) == PYTORCH

    expected = fused_add_rms_norm.impls[PYTORCH].impl_fn(x, residual, weight, 1e-6)
    kept = x.clone(), residual.clone()
    found = fused_add_rms_norm(x, residual, weight, 1e-6)  # which overwrites nothing
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])
    in_place = fused_add_rms_norm.maybe_inplace(x, residual, weight, 1e-6)
    for results in (found, in_place):
        torch.testing.assert_close(results[0], expected[0])
        assert torch.equal(results[1], expected[1])
