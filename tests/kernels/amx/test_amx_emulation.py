"""The AMX kernels on an emulated tile unit, against exact sums in float64."""

import itertools
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.amx.emulated import (
    COMPILE,
    CSRC,
    KERNELS,
    NEEDS,
    Emulation,
    from_bf16,
    half_masks,
    pack,
    run,
    to_bf16,
)
from tests.sanitizing.build import ROOT, setup_module

pytestmark = NEEDS

OUTPUTS = [16, 24, 40, 272]
INPUTS = [8, 64, 72, 200, 512, 1376]
FEW_TOKENS = [1, 2, 4, 5, 8, 15, 16, 17, 31, 32]
MANY_TOKENS = [*FEW_TOKENS, 33, 48, 64, 100, 300]


@pytest.fixture(scope="module")
def layers() -> dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.uint8]]]:
    """Dense weights of small integers and their packed form, by shape."""
    rng = np.random.default_rng(0)
    shapes = [(n, k) for n in OUTPUTS for k in INPUTS]
    made = {}
    for n, k in [*shapes, (2400, 8), (64, 4352)]:
        mask = half_masks(rng, n, k)
        weight = np.where(mask, rng.integers(-8, 9, (n, k)), 0).astype(np.float64)
        made[n, k] = weight, pack(weight, mask)
    return made


def check_exact(
    emulation: Emulation,
    layers: dict,
    kernel: str,
    m: int,
    n: int,
    k: int,
    bias: bool,
    gap: int,
    slow: bool = False,
) -> None:
    """Sums of small integers are exact in any order: the result has exactly one rounding."""
    rng = np.random.default_rng([m, n, k])
    weight, packed = layers[n, k]
    x = rng.integers(-8, 9, (m, k)).astype(np.float64)
    added = rng.integers(-127, 128, n) / 4 if bias else None
    expected = to_bf16(x @ weight.T + (added if bias else 0.0))
    got = run(emulation, kernel, x, packed, n, added, gap, slow)
    np.testing.assert_array_equal(
        from_bf16(got), from_bf16(expected), f"{kernel=} {m=} {n=} {k=} {bias=} {gap=}"
    )


CASES = [("few", m) for m in FEW_TOKENS] + [("many", m) for m in MANY_TOKENS]


@pytest.mark.parametrize(("kernel", "m"), CASES)
def test_equals_exact_sums(emulation, layers, kernel: str, m: int) -> None:
    emulation.set_threads(1)
    for case, (n, k) in enumerate(itertools.product(OUTPUTS, INPUTS), start=m):
        bias, gap = case % 2 == 0, 24 * (case // 2 % 2)
        check_exact(emulation, layers, kernel, m, n, k, bias, gap)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_equals_exact_sums_on_many_threads(emulation, layers, threads: int, in_turn: bool) -> None:
    emulation.set_threads(threads, in_turn)
    for kernel, m in [("few", 1), ("few", 17), ("many", 48), ("many", 300)]:
        for n, k in [(16, 512), (272, 200), (272, 1376)]:
            check_exact(emulation, layers, kernel, m, n, k, bias=True, gap=8)


@pytest.mark.parametrize(("kernel", "m"), [("few", 3), ("many", 3)])
def test_more_threads_than_work_ranges(emulation, layers, kernel: str, m: int) -> None:
    emulation.set_threads(70)
    check_exact(emulation, layers, kernel, m, 2400, 8, bias=True, gap=0)


@pytest.mark.parametrize("kernel", ["few", "many"])
def test_a_late_thread_is_waited_for(emulation, layers, kernel: str) -> None:
    """One thread is held up while it packs x: the first 256 of 4352 inputs lie in the slow page."""
    emulation.set_threads(2)
    check_exact(emulation, layers, kernel, 1, 64, 4352, bias=False, gap=0, slow=True)


@pytest.mark.parametrize("m", [1024, 1025, 2100])
def test_more_tokens_than_are_packed_at_once(emulation, layers, m: int) -> None:
    emulation.set_threads(2)
    check_exact(emulation, layers, "many", m, 24, 72, bias=True, gap=8)


@pytest.mark.parametrize(("kernel", "m"), [("few", 4), ("few", 32), ("many", 100)])
def test_real_numbers_are_rounded_once(emulation, kernel: str, m: int) -> None:
    """Half a unit in the last place of bfloat16, and the float32 error of the sum."""
    rng = np.random.default_rng(m)
    n, k = 48, 1376
    emulation.set_threads(1)
    mask = half_masks(rng, n, k)
    weight = np.where(mask, from_bf16(to_bf16(rng.normal(size=(n, k)))), 0.0)
    x = from_bf16(to_bf16(rng.normal(size=(m, k))))
    bias = from_bf16(to_bf16(rng.normal(size=n)))
    got = from_bf16(run(emulation, kernel, x, pack(weight, mask), n, bias, gap=0))
    exact = x @ weight.T + bias
    sums = np.abs(x) @ np.abs(weight.T) + np.abs(bias)
    assert (np.abs(got - exact) <= 2.0**-8 * np.abs(exact) + 2.0**-20 * sums).all()


def test_infinite_and_nan_inputs_stay_in_their_row(emulation, layers) -> None:
    emulation.set_threads(1)
    weight, packed = layers[40, 72]
    for kernel in ("few", "many"):
        x = np.ones((20, 72))
        x[3, 5], x[18, 70] = np.inf, np.nan
        got = from_bf16(run(emulation, kernel, x, packed, 40, None, gap=0))
        clean = np.delete(np.arange(20), [3, 18])
        np.testing.assert_array_equal(got[clean], np.delete(x, [3, 18], 0) @ weight.T)
        assert np.isnan(got[18]).all()
        assert not np.isfinite(got[3]).any()


def test_emulated_multiply_add_sums_even_and_odd_inputs_apart(emulation) -> None:
    a = np.zeros((16, 32), np.float32)
    b = np.zeros((16, 16, 2), np.float32)
    c = np.zeros((16, 16), np.float32)
    a[0, :4] = [2.0**24, 1, -(2.0**24), 1]  # even: 2^24 - 2^24, odd: 1 + 1
    a[1, :4] = [2.0**24, 0, 1, 0]  # both even: the 1 is lost
    a[2, :2] = 2.0**-126, 2.0**-126  # each product is a denormal
    a[3, 0] = 2.0**-130  # a denormal input
    b[:2, 0] = 1
    b[0, 1] = 0.5
    b[0, 2] = 2.0**100
    c[4, 0] = 2.0**-130
    bits = [to_bf16(np.ascontiguousarray(side)) for side in (a, b)]
    emulation.library.multiply_add(c.ctypes.data, bits[0].ctypes.data, bits[1].ctypes.data)
    assert emulation.violation() == ""
    assert c[0, 0] == 2
    assert c[1, 0] == 2.0**24
    assert c[2, 0] == 2.0**-125
    assert c[2, 1] == 0
    assert c[3, 2] == 0
    assert c[4, 0] == 0


@pytest.mark.parametrize(
    ("misuse", "rule"),
    [
        ("use before configure", "without a configuration"),
        ("use after release", "after its release"),
        ("release twice", "released without a configuration"),
        ("configure twice", "configured twice"),
        ("unconfigured tile", "not configured"),
        ("oversized tile", "larger than 16 rows"),
        ("stride of another configuration", "wrong configuration"),
        ("columns of another tile", "columns of C and B differ"),
        ("rows of another tile", "rows of C and A differ"),
        ("same tile twice", "with itself"),
    ],
)
def test_emulation_reports_misuse(emulation, misuse: str, rule: str) -> None:
    assert emulation.library.misuse(misuse.encode())
    assert rule in emulation.violation()
    assert emulation.library.configured_units() == 0


def hardware_object(source: str, folder: Path) -> Path:
    """What a kernel's file was compiled to when the library was built, or is in a folder."""
    setup = setup_module()
    built = (ROOT / setup.OBJECTS / "cpu" / source).with_suffix(".o")
    command = built.with_suffix(".command")
    if command.exists() and setup.up_to_date(built, shlex.split(command.read_text())):
        return built
    compiled = folder / "source.o"
    line = [*COMPILE, "-I", CSRC, "-fPIC", "-c", CSRC / "cpu" / f"{source}.cpp", "-o", compiled]
    subprocess.run(line, check=True)
    return compiled


@pytest.mark.skipif(
    shutil.which("objdump") is None or shutil.which("nm") is None, reason="needs binutils"
)
@pytest.mark.parametrize("source", KERNELS)
def test_compiles_for_the_hardware_and_exports_only_the_kernel(tmp_path: Path, source: str) -> None:
    built = hardware_object(source, tmp_path)
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(built)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    products = ("tdpbf16ps",)
    if "int8" in source:
        products = ("tdpbssd", "tdpbsud") if source == "amx/int8_few" else ("tdpbssd",)
    for instruction in ("ldtilecfg", "tileloadd", *products, "tilestored", "tilerelease"):
        assert instruction in listing
    # C = 0, A = weights = 4, B = tokens = 6, as the assembler lists them: last to first.
    assert f"{products[0]} %tmm6,%tmm4,%tmm0" in listing
    # An inline function compiled here for AVX-512 could replace the plain copy of another file.
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", "--extern-only", str(built)],
        check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    code = [line.split(maxsplit=2)[2] for line in symbols if line.split()[1] in "TWuU"]
    arguments = "permllm::cpu::LinearOf<unsigned short> const&, permllm::cpu::Worker&"
    kernel = source.replace("/", "_")
    if kernel == "amx_dense":
        assert code == [f"permllm::cpu::{kernel}({arguments})"]
        return
    values = ("permllm::cpu::bf12", "permllm::cpu::dense12", "unsigned short")
    if "int8" in source:
        values = ("permllm::cpu::int4", "permllm::cpu::dense8", "signed char")
    assert code == [f"void permllm::cpu::{kernel}_tokens<{value}>({arguments})" for value in values]
