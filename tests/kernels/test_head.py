"""The kernels of the dense output head against float64, on any number of threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_vllm import ops
from permllm_vllm.backends.cpu import INT8_ONLY, SIXTEEN_BITS_ONLY, CpuBackend, instruction_sets
from tests.kernels.cases import TWELVE_BITS, on_each_with_twelve_bits

pytestmark = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
head_linear = torch.ops.permllm.head_linear
TRIED = 20
"""Tokens at most where a kernel takes any number: more than a vector of them, and than are few."""


def most_tokens(outputs: int, inputs: int, half: bool = False) -> int:
    """How many to try with a weight; 0 where there is no kernel."""
    if ops.missing_reason:
        return 0
    most: int = torch.ops.permllm.cpu_head_tokens(outputs, inputs, half)
    return most if most < 1 << 30 else TRIED


MOST, HALF = most_tokens(64, 64), most_tokens(64, 64, half=True)
needs_half = pytest.mark.skipif(not HALF, reason="this CPU has no kernel for a float16 head")
needs_kernel = pytest.mark.skipif(not MOST, reason="this CPU has no kernel for a dense head")
AVX2 = ("avx2_vnni", "avx2")
"""Their kernel takes outputs in a multiple of 8, inputs in one of 64, and any number of tokens: few
in one way, more in another, with other roundings."""
WITH_KERNELS = (*(isa for isa in SIXTEEN_BITS_ONLY if isa not in INT8_ONLY), *AVX2)
HERE = "" if ops.missing_reason else CpuBackend().instruction_set
SAME_ROUNDINGS = {isa: (range(1, 2), range(2, 7), range(7, TRIED + 1)) for isa in AVX2}
"""Numbers of tokens that one kernel multiplies; elsewhere that is all of them."""
MOST_ROWS = 600  # more than a group, whose rows are rounded together


def drawn(rows: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=generator).bfloat16()


def assert_right(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Off by one rounding to the dtype of x, and those of float32 sums."""
    assert found.dtype == x.dtype
    added = torch.zeros(len(weight)) if bias is None else bias
    exact = x.double() @ weight.double().T + added.double()
    magnitude = x.double().abs() @ weight.double().abs().T + added.double().abs()
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs() + 2**-25
    assert ((found.double() - exact).abs() <= rounding + magnitude * 1e-6).all()


@given(
    tokens=st.integers(1, MOST + 2),
    outputs=st.integers(1, MOST_ROWS),
    vectors=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_shape(tokens: int, outputs: int, vectors: int, seed: int) -> None:
    x, weight = drawn(tokens, 32 * vectors, seed), drawn(outputs, 32 * vectors, seed + 1)
    assert_right(head_linear(x, weight), x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", WITH_KERNELS)
def test_every_kernel_of_this_cpu(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that serves here, and those that serve on other CPUs."""
    if isa not in instruction_sets():
        pytest.skip(f"this CPU has no {isa}")
    if (isa, dtype) == ("amx", torch.float16):
        pytest.skip("amx has no kernel for a float16 head")
    monkeypatch.setenv("PERMLLM_CPU_ISA", isa)
    shapes = ((8, 64), (72, 576), (48, 4096))
    for outputs, inputs in shapes if isa in AVX2 else ((1, 64), (75, 576), (50, 4096)):
        most = most_tokens(outputs, inputs, dtype == torch.float16)
        assert most >= 4
        weight = drawn(outputs, inputs, 1).to(dtype)
        for tokens in range(1, most + 1):
            x = drawn(tokens, inputs, tokens).to(dtype)
            found = head_linear(x, weight)
            assert_right(found, x, weight)
            if isa not in AVX2:
                assert torch.equal(found[-1:], head_linear(x[-1:], weight))


@needs_half
@given(
    tokens=st.integers(1, 20),
    outputs=st.integers(1, 200),
    vectors=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_float16(tokens: int, outputs: int, vectors: int, seed: int) -> None:
    """Any number of tokens, whose bits depend on no other."""
    x = drawn(tokens, 32 * vectors, seed).float().mul(1.001).half()
    weight = drawn(outputs, 32 * vectors, seed + 1).float().mul(1.001).half()
    found = head_linear(x, weight)
    assert_right(found, x, weight)
    if HERE not in AVX2:
        assert torch.equal(found[-1:], head_linear(x[-1:], weight))


@pytest.mark.parametrize("inputs", [8, 33, 100])
def test_inputs_that_fill_no_vector_are_pytorchs(inputs: int) -> None:
    x, weight = drawn(2, inputs, 0), drawn(50, inputs, 1)
    assert torch.equal(head_linear(x, weight), torch.nn.functional.linear(x, weight))


def test_float32_is_pytorchs() -> None:
    x, weight = drawn(2, 64, 0).float(), drawn(50, 64, 1).float()
    assert torch.equal(head_linear(x, weight), torch.nn.functional.linear(x, weight))


@needs_kernel
def test_strides_and_dimensions() -> None:
    weight = drawn(104, 64, 1)
    x = drawn(6, 128, 0)[::2, ::2].reshape(3, 1, 64)
    found = head_linear(x, weight)
    assert found.shape == (3, 1, 104)
    assert torch.equal(found, head_linear(x.contiguous(), weight))
    rows = drawn(208, 64, 1)[::2]  # is no weight that can be read in place
    assert_right(head_linear(x[:, 0], rows), x[:, 0], rows)


@needs_kernel
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    weight = drawn(1000, 576, 1)
    for tokens in range(1, MOST + 1):
        x = drawn(tokens, 576, tokens)
        torch.set_num_threads(1)
        alone = head_linear(x, weight)
        torch.set_num_threads(threads)
        assert torch.equal(head_linear(x, weight), alone)


@needs_kernel
@pytest.mark.parametrize("inputs", [32, 64, 320, 4096])
def test_a_token_does_not_depend_on_the_others(inputs: int) -> None:
    """Its bits are the same in any place, and among any number of others for one kernel."""
    most = most_tokens(504, inputs)
    if not most:
        pytest.skip(f"the kernel of this CPU takes no {inputs} inputs")
    weight = drawn(504, inputs, 1)
    for numbers in SAME_ROUNDINGS.get(HERE, (range(1, most + 1),)):
        x = drawn(numbers[-1], inputs, 2)
        together = head_linear(x, weight)
        for tokens in numbers:
            for first in range(len(x) - tokens + 1):
                some = slice(first, first + tokens)
                assert torch.equal(head_linear(x[some], weight), together[some])


@needs_kernel
def test_another_instruction_set_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMLLM_CPU_ISA", "portable")
    assert torch.ops.permllm.cpu_head_tokens(64, 64) == 0
    x, weight = drawn(2, 64, 0), drawn(50, 64, 1)
    assert torch.equal(head_linear(x, weight), torch.nn.functional.linear(x, weight))


def test_no_tokens() -> None:
    assert head_linear(drawn(0, 64, 0), drawn(50, 64, 1)).shape == (0, 50)


def test_no_outputs() -> None:
    assert head_linear(drawn(2, 64, 0), drawn(0, 64, 1)).shape == (2, 0)


@pytest.mark.parametrize("inputs", [32, 128])
def test_a_wrong_number_of_inputs(inputs: int) -> None:
    with pytest.raises(RuntimeError, match=r"does not fit a weight of shape \[50, 64\]"):
        head_linear(drawn(1, inputs, 0), drawn(50, 64, 1))


def test_huge_bytes() -> None:
    memory = torch.ops.permllm.cpu_huge_bytes(3 << 20)
    assert (memory.dtype, memory.shape) == (torch.uint8, (3 << 20,))
    assert memory.data_ptr() % 64 == 0
    with pytest.raises(RuntimeError, match="at least one"):
        torch.ops.permllm.cpu_huge_bytes(0)


def test_shapes_need_no_data() -> None:
    x, weight = torch.empty(5, 64, device="meta"), torch.empty(50, 64, device="meta")
    assert head_linear(x, weight).shape == (5, 50)


@on_each_with_twelve_bits
@given(
    tokens=st.integers(1, 70),
    outputs=st.integers(1, 50),
    eighths=st.integers(1, 140),
    tiny=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_twelve_bits(
    isa: str, tokens: int, outputs: int, eighths: int, tiny: int, seed: int
) -> None:
    """Some rows have values that no 12 bits hold; the layer may have too many of them."""
    x, weight = drawn(tokens, 8 * eighths, seed), drawn(outputs, 8 * eighths, seed + 1)
    weight[:, 5 :: 8 * 60] *= 2.0 ** (-6 * tiny)
    packed = CpuBackend(isa).pack_dense(weight)
    if packed is not None:
        bias = drawn(1, outputs, seed + 2)[0]
        found = ops.sparse_linear(
            x, packed.packed, packed.metadata, None, None, bias, outputs, "dense"
        )
        assert_right(found, x, weight, bias)


@on_each_with_twelve_bits
@pytest.mark.parametrize("tokens", [1, 4, 8, 10, 11, 16, 17, 32, 33, 64])
def test_every_value_in_twelve_bits_is_exact(isa: str, tokens: int) -> None:
    weight = drawn(45, 1096, 3)
    weight[::9, 700] = -(2.0**-40)
    weight[4] = 0.0
    packed = CpuBackend(isa).pack_dense(weight)
    assert packed is not None
    parts = torch.eye(1096).bfloat16().split(tokens)
    found = [
        ops.sparse_linear(part, packed.packed, packed.metadata, None, None, None, 45, "dense")
        for part in parts
    ]
    assert torch.equal(torch.cat(found), weight.T)


@on_each_with_twelve_bits
def test_what_has_no_twelve_bits_is_not_packed(isa: str) -> None:
    backend = CpuBackend(isa)
    assert backend.pack_dense(drawn(16, 64, 0) * 2.0 ** torch.arange(64).neg().bfloat16()) is None
    assert backend.pack_dense(drawn(16, 68, 0)) is None
    for other in set(instruction_sets()) - set(TWELVE_BITS):
        assert CpuBackend(other).pack_dense(drawn(16, 64, 0)) is None


@on_each_with_twelve_bits
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(8, 64), "bfloat16"),
        (torch.ones(64).bfloat16(), "must be"),
        (torch.ones(8, 60).bfloat16(), "multiple of 8"),
        (torch.ones(0, 64).bfloat16(), "neither of them 0"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_refused(isa: str, weight: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.permllm.cpu_pack_dense(weight, isa)
