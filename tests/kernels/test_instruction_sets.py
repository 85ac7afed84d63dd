"""Which instruction set serves, and what is particular to those that compute in float32."""

from pathlib import Path

import pytest
import torch

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends.cpu import (
    INT8_ONLY,
    LARGEST_UNDONE_BLOCK,
    MOST_INT8_INPUTS,
    SIXTEEN_BITS_ONLY,
    CpuBackend,
    instruction_sets,
)
from tests.kernels.cases import LANES
from tests.kernels.conftest import EVERY_INSTRUCTION_SET
from tests.kernels.test_cpu import exact, run
from tests.kernels.test_int8 import INTEGERS

pytestmark = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
ROWS, BLOCK_INPUTS = 8, 64
N, K = 24, 128


@pytest.fixture
def float32_isa(isa: str) -> str:
    """Instruction sets without bfloat16 products."""
    if isa in SIXTEEN_BITS_ONLY:
        pytest.skip(f"{isa} has bfloat16 products")
    return isa


def zen5() -> bool:
    """Whether this is an AMD processor that multiplies as fast as its own kernels expect."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    amd = fields.get("vendor_id") == "AuthenticAMD"
    return amd and int(fields["cpu family"]) >= 26 and "avx512_bf16" in fields["flags"]


def test_order_is_fastest_first():
    found = instruction_sets()
    order = list(EVERY_INSTRUCTION_SET)
    if not zen5():  # other CPUs run its kernels, and have faster ones
        order.remove("zen5")
        order.insert(order.index("avx512_bf16") + 1, "zen5")
    assert found == [isa for isa in order if isa in found]
    assert found[-1] == "portable"


def test_the_fastest_serves_unless_another_is_named(monkeypatch):
    monkeypatch.delenv("PERMLLM_CPU_ISA", raising=False)
    assert CpuBackend().instruction_set == instruction_sets()[0]
    for isa in instruction_sets():
        monkeypatch.setenv("PERMLLM_CPU_ISA", isa)
        assert CpuBackend().instruction_set == isa
    monkeypatch.setenv("PERMLLM_CPU_ISA", "")
    assert CpuBackend().instruction_set == instruction_sets()[0]


def test_an_override_that_cannot_run_says_what_can(monkeypatch):
    missing = [isa for isa in EVERY_INSTRUCTION_SET if isa not in instruction_sets()]
    if not missing:
        pytest.skip("this CPU runs every instruction set")
    monkeypatch.setenv("PERMLLM_CPU_ISA", missing[0])
    value = f"PERMLLM_CPU_ISA={missing[0]} cannot run"
    with pytest.raises(RuntimeError, match=rf"{value}: .* only {','.join(instruction_sets())}\. U"):
        CpuBackend()


@pytest.mark.skipif(
    not set(INT8_ONLY) & set(instruction_sets()), reason="no such instruction set here"
)
@pytest.mark.parametrize("isa", INT8_ONLY)
def test_values_without_a_kernel_are_multiplied_by_the_next(isa):
    layer = random_layer(24, 128)
    assert CpuBackend(isa, values=torch.int8).instruction_set == isa
    following = CpuBackend(isa, values=torch.bfloat16).instruction_set
    assert following not in SIXTEEN_BITS_ONLY
    packed, expected = (
        CpuBackend(isa).pack(layer.weights),
        CpuBackend(following).pack(layer.weights),
    )
    assert torch.equal(packed.metadata, expected.metadata)
    with pytest.raises(RuntimeError, match=f"{isa} has no kernel for bfloat16 values: pack for"):
        torch.ops.permllm.cpu_pack(layer.weights.values, layer.weights.mask, None, 64, isa)


def refused(text, operator, *operands) -> bool:
    """Whether an operator refuses these, with an error that has this text."""
    try:
        operator(*operands)
    except RuntimeError as error:
        if text not in str(error):
            raise
        return True
    return False


def test_the_backend_knows_what_the_kernels_take(isa):
    """What backends/cpu.py says of instruction sets, against the operators."""
    pack = torch.ops.permllm.cpu_pack
    layer = random_layer(N, K)
    weights, integers = layer.weights, to_int8(layer).weights
    bfloat16 = isa not in INT8_ONLY
    no_kernel = refused("has no kernel for", pack, weights.values, weights.mask, None, 64, isa)
    assert no_kernel != bfloat16

    values, scale = (weights.values, None) if bfloat16 else (integers.values, integers.scale)
    permuted = values, weights.mask, weights.permutation, LARGEST_UNDONE_BLOCK, isa
    assert refused("cannot be undone", pack, *permuted) == (isa not in SIXTEEN_BITS_ONLY)

    packed, metadata = pack(values, weights.mask, None, 64, isa)
    operands = packed, metadata, None, scale, None, N, "2:4"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.ones(1, K, dtype=dtype)
        expected = dtype == torch.float32 and isa in SIXTEEN_BITS_ONLY
        assert refused("takes bfloat16 and float16", ops.sparse_linear, x, *operands) == expected

    if torch.ops.permllm.cpu_packs_int8(isa):
        for inputs in (MOST_INT8_INPUTS, MOST_INT8_INPUTS + 8):
            row = torch.ones(1, inputs // 2, dtype=torch.int8)
            mask = torch.full((1, inputs // 8), 0x0F, dtype=torch.uint8)
            too_many = refused("can be summed exactly", pack, row, mask, None, 64, isa)
            assert too_many == (inputs > MOST_INT8_INPUTS)


@pytest.mark.parametrize("block_size", [32, 64])
def test_permutations_are_not_undone(float32_isa, block_size):
    layer = random_layer(16, 128, block_size=block_size)
    weights = layer.weights
    with pytest.raises(RuntimeError, match=f"block size {block_size} on {float32_isa}.*without it"):
        torch.ops.permllm.cpu_pack(
            weights.values, weights.mask, weights.permutation, block_size, float32_isa
        )
    assert CpuBackend(float32_isa).pack(weights).permutation.dtype == torch.int32


@pytest.mark.parametrize(("n", "k"), [(8, 64), (13, 72), (3, 8), (20, 200)])
def test_every_mask_keeps_four_of_eight(float32_isa, n, k):
    """Padding too: the kernels compute the place of the values from that of the mask."""
    if float32_isa in LANES:
        pytest.skip(f"{float32_isa} has no masks: test_lanes.py")
    for layer in (random_layer(n, k, permuted=False), to_int8(random_layer(n, k, permuted=False))):
        packed = CpuBackend(float32_isa).pack(layer.weights).packed
        value_bytes = layer.weights.values.element_size()
        block = ROWS * (8 + BLOCK_INPUTS // 2 * value_bytes)
        blocks = -(-n // ROWS) * -(-k // BLOCK_INPUTS)
        masks = packed[: blocks * block].view(blocks, block)[:, : ROWS * 8]
        bits = (masks.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        assert (bits.sum(dim=-1) == 4).all()


@pytest.mark.parametrize("m", [1, 2, 4, 5, 7, 13, 40, 300])
def test_int8_values_meet_x_as_it_is(float32_isa, m):
    """Products of int8 with bfloat16 are exact in float32: no activation is quantized."""
    if float32_isa in INTEGERS:
        pytest.skip(f"{float32_isa} rounds activations to integers: test_int8.py")
    layer = to_int8(random_layer(75, 328, bias=True, permuted=False))
    x = torch.randn(m, 328, generator=torch.Generator().manual_seed(m)).bfloat16()
    x[:, 0] = 1000.0  # would leave 8 bits little for the others
    reference = exact(x, layer)
    size = x.double().abs() @ layer.dense.double().abs().t()
    error = (run(layer, float32_isa, x).double() - reference).abs()
    assert (error <= 2**-8 * reference.abs() + 2**-20 * size).all()
