"""What the benchmark of the output head measures, and what it refuses."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import head
from benchmarks.cpu import contestants
from benchmarks.cpu.contestants import Call, Contestant
from benchmarks.cpu.products import WrongProduct
from benchmarks.head import (
    OURS,
    TOKENS,
    Row,
    head_linear,
    measure,
    random_head,
)
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from permllm_vllm.quantization import head as quantization_head
from tests.kernels.cases import TWELVE_BITS

N, K = 96, 64
MOST = 0 if ops.missing_reason else torch.ops.permllm.cpu_head_tokens(N, K)
needs_kernel = pytest.mark.skipif(not MOST, reason="this CPU has no kernel for a dense head")


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "POOL_BYTES", 1)


pack_dense = CpuBackend.pack_dense


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for weights as they stand; those for a copy in 12 bits are tested apart."""
    monkeypatch.setattr(CpuBackend, "pack_dense", lambda *_: None)


@pytest.fixture
def threads() -> Iterator[None]:
    """`main` sets them for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["head", *options])


@needs_kernel
def test_all_tokens_of_the_kernel_can_be_measured() -> None:
    assert min(TOKENS) == 1
    assert MOST in TOKENS or max(TOKENS) < MOST


@needs_kernel
def test_ours_multiplies_by_a_copy() -> None:
    dense = random_head(N, K)
    call = head_linear(dense)
    exact = torch.ops.permllm.head_linear(torch.eye(K).bfloat16()[:MOST], dense)
    dense.zero_()
    assert torch.equal(call(torch.eye(K).bfloat16()[:MOST]), exact)


@needs_kernel
def test_rows_compare_the_kernel_with_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(found: dict[str, Contestant], *_: object) -> dict[str, float]:
        return {name: 2.0 if name == OURS else 5.0 for name in found}

    monkeypatch.setattr(head, "median_times", times)
    with torch.inference_mode():
        first, second = measure((N, K), [1, 5], threads=1, quick=True)
    assert {row.peer for row in first} == set(contestants.peer_makers(int8=False))
    for rows, m in ((first, 1), (second, 5)):
        assert {(row.n, row.k, row.m, row.ratio) for row in rows} == {(N, K, m, 2.5)}
        assert {row.gigabytes_per_second for row in rows} == {6.1}  # 12288 bytes in 2 us
        assert all(0 < row.relative_error < 0.004 for row in rows)


@pytest.mark.parametrize("isa", TWELVE_BITS)
def test_a_copy_in_twelve_bits_takes_all_tokens(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in instruction_sets():
        pytest.skip(f"this CPU or build does not run {isa}")
    monkeypatch.setenv("PERMLLM_CPU_ISA", isa)
    monkeypatch.setattr(CpuBackend, "pack_dense", pack_dense)
    monkeypatch.setattr(head, "median_times", lambda found, *_: dict.fromkeys(found, 2.0))
    assert head.most_tokens((N, K), "bfloat16") == max(TOKENS)
    if torch.ops.permllm.cpu_head_tokens(N, K, True):
        assert head.most_tokens((N, K), "float16") > max(TOKENS)
    dense = random_head(N, K)
    copy = CpuBackend().pack_dense(dense)
    assert copy is not None
    monkeypatch.setattr(quantization_head, "copied_tokens", lambda weight: 1)
    monkeypatch.setattr(head, "copied_tokens", lambda weight: 1)
    most: int = torch.ops.permllm.cpu_head_tokens(N, K)
    with torch.inference_mode():
        few, many = measure((N, K), [1, most], threads=1, quick=True)
    assert {row.gigabytes_per_second for row in few} == {round(copy.packed.nbytes / 2e3, 1)}
    assert {row.gigabytes_per_second for row in many} == {round(dense.nbytes / 2e3, 1)}


@pytest.mark.skipif(
    bool(ops.missing_reason) or not torch.ops.permllm.cpu_head_tokens(N, K, True),
    reason="this CPU has no kernel for a float16 head",
)
def test_rows_of_float16() -> None:
    with torch.inference_mode():
        (rows,) = measure((N, K), [9], threads=1, quick=True, dtype=torch.float16)
    assert all(0 < row.relative_error < 0.0005 for row in rows)


@pytest.mark.skipif(
    bool(ops.missing_reason) or not CpuBackend().rounds_dense(K), reason="no such kernel here"
)
def test_a_head_of_int8() -> None:
    with torch.inference_mode():
        (rows,) = measure((N, K), [9], threads=1, quick=True, values="int8")
    assert all(0.005 < row.relative_error < 0.02 for row in rows)


@needs_kernel
def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(dense: torch.Tensor, values: str) -> Call:
        return head_linear(2 * dense, values)

    monkeypatch.setattr(head, "head_linear", doubled)
    with pytest.raises(WrongProduct, match="permllm is not timed"):
        next(measure((N, K), [1], threads=1, quick=True))


@needs_kernel
def test_a_run_measures_what_its_result_lacks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[tuple[tuple[int, int], tuple[int, ...]]] = []

    def noted(
        shape: tuple[int, int],
        tokens: list[int],
        threads: int,
        quick: bool,
        dtype: torch.dtype,
        values: str,
    ) -> Iterator[list[Row]]:
        assert (threads, quick, dtype, values) == (1, True, torch.bfloat16, "kept")
        found.append((shape, tuple(tokens)))
        for m in tokens:
            yield [Row(*shape, m, "abacus", 1, "torch", 4.0, 2.0, 2.0, 1.0, 0.0, 0.5)]

    monkeypatch.setattr(head, "measure", noted)
    file = tmp_path / "result.json"
    options = ["--quick", "--json", str(file)]
    command(monkeypatch, "--shapes", "96x64", "--tokens", "1", "2", *options)
    head.main()
    command(monkeypatch, "--shapes", "96x64", "64x64", "--tokens", "2", "4", *options)
    head.main()
    assert found == [((96, 64), (1, 2)), ((96, 64), (4,)), ((64, 64), (2, 4))]
    result = json.loads(file.read_text())
    assert len(result["rows"]) == 5
    assert {"date", "machine", "versions", "isa", "threads"} <= set(result)
    command(monkeypatch, "--shapes", "96x64", "--tokens", "1", "--json", str(file))
    with pytest.raises(SystemExit):
        head.main()
    assert "its rows have rounds" in capsys.readouterr().err


@needs_kernel
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--shapes", f"{N}x{K}", "--tokens", "1", str(MOST + 1)],
            f"--tokens {MOST + 1}: the kernel takes 1 to {MOST} of {K} inputs",
        ),
        (["--shapes", f"{N}x{K}", "--tokens", "0"], f"--tokens 0: the kernel takes 1 to {MOST}"),
        (["--shapes", "96x64", "96x48"], "--shapes 96x48: the kernel takes a multiple of 32"),
    ],
    ids=["more tokens", "no tokens", "inputs"],
)
def test_what_the_kernel_does_not_take_is_refused(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(monkeypatch, *options)
    with pytest.raises(SystemExit):
        head.main()
    assert message in capsys.readouterr().err


@pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
def test_without_a_kernel_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMLLM_CPU_ISA", "portable")
    command(monkeypatch)
    with pytest.raises(
        SystemExit, match="portable has no kernel for a head of bfloat16, values kept"
    ):
        head.main()


def test_without_the_library_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "missing_reason", "never built")
    command(monkeypatch)
    with pytest.raises(SystemExit, match="the compiled kernels are missing: never built"):
        head.main()
