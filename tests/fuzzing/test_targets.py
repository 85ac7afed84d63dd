"""The quick form of `make fuzz`: seeded inputs, and proof that a bug would be found."""

import math
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from permllm_vllm import ops
from permllm_vllm.backends.cpu import SIXTEEN_BITS_ONLY, instruction_sets
from tests.fuzzing import plain
from tests.fuzzing.checkpoints import reshaped, right_weight
from tests.fuzzing.choices import Choices, encoded
from tests.fuzzing.operators import DTYPES, damage_argument
from tests.fuzzing.outcome import Finding
from tests.fuzzing.planted import BUGS
from tests.fuzzing.samples import NORMAL
from tests.fuzzing.targets import TARGETS

INPUTS = {"config": 1000, "index": 1000, "checksums": 1000, "file": 1000, "layers": 300,
          "contents": 1000, "vllm": 300, "bitmask": 300,
          "linear": 1000, "experts": 500, "pack": 500}  # fmt: skip
pytestmark = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")


def runnable(target: str) -> Callable[[bytes], None]:
    if target == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed")
    return TARGETS[target].run


def fuzz(target: str, inputs: int, seed: int) -> None:
    """Run a target on random inputs; a finding carries the input."""
    run = runnable(target)
    shuffle = random.Random(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(inputs):
            data = shuffle.randbytes(shuffle.randint(0, 64))
            try:
                run(data)
            except BaseException as error:
                error.add_note(f"TARGETS[{target!r}].run(bytes.fromhex({data.hex()!r}))")
                raise
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_is_answered_wrongly(target: str) -> None:
    fuzz(target, INPUTS[target], seed=2026)


def test_a_tensor_that_lost_its_rows_gets_as_many_numbers_as_it_says() -> None:
    for data in range(4**4):
        tensor = plain.Stored("BF16", [3, 2], bytes(range(12)))
        choices = Choices(bytes(data >> shift & 3 for shift in (0, 2, 4, 6)))
        for _ in range(2):
            tensor = reshaped(choices, tensor)
            assert len(tensor.content) == 2 * math.prod(tensor.shape)


@pytest.mark.parametrize("target", TARGETS)
def test_the_plain_input_is_good(target: str) -> None:
    """An empty input damages nothing: the target then expects the right answer."""
    runnable(target)(b"")


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    runnable(BUGS[bug].target)
    if bug == "out-of-range permutation packed" and instruction_sets()[0] not in SIXTEEN_BITS_ONLY:
        pytest.skip("no kernel of this CPU undoes permutations where it packs")
    with BUGS[bug].planted(), pytest.raises(AssertionError) as finding:
        fuzz(BUGS[bug].target, 2000, seed=1)
    assert type(finding.value).__name__ == "Finding"


@pytest.mark.parametrize("number", range(len(NORMAL)))
def test_a_wrong_weight_of_a_sample_is_not_right(number: int) -> None:
    sample = NORMAL[number]
    for rows in plain.read(encoded(sample.config), sample.file()).values():
        expect_comparison(torch.tensor(rows), torch.bfloat16)


def test_a_wrong_weight_of_vllm_is_not_right() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from tests.fuzzing import vllm_layers

    for layer in vllm_layers.LAYERS:
        for dtype in vllm_layers.DTYPES:
            rows, _, _ = vllm_layers.meaning(layer, layer.arrivals, dtype)
            expect_comparison(torch.tensor(rows), dtype)


def expect_comparison(dense: torch.Tensor, held: torch.dtype) -> None:
    """One wrong weight of an undamaged layer is seen, with scale and without."""
    for scale in (None, torch.ones(len(dense))):
        found = dense.to(held).float().clone()
        assert right_weight(found, dense, held, scale)
        found[-1, -1] += 1
        assert not right_weight(found, dense, held, scale)


@pytest.mark.parametrize(
    "number", [i for i, one in enumerate(NORMAL) if one.value_dtype[:3] != "int"]
)
def test_an_undamaged_sample_finds_a_wrong_value(number: int) -> None:
    module, undamaged, fastest = 0, 0, 1
    with BUGS["one value packed wrong"].planted(), pytest.raises(Finding):
        runnable("contents")(bytes([number, module, undamaged, fastest]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_argument_is_changed_again(dtype: torch.dtype) -> None:
    shuffle = random.Random(1)
    for _ in range(300):
        arguments = {"x": torch.zeros(2, 8), "metadata": torch.zeros(4, dtype=dtype)}
        damage_argument(
            Choices(shuffle.randbytes(16)),
            {**dict.fromkeys(("packed", "permutation", "scale", "bias")), **arguments},
        )


def test_shares_add_up() -> None:
    assert sum(target.share for target in TARGETS.values()) == 1000
    assert INPUTS.keys() == TARGETS.keys()


def test_coverage_guided_fuzzing_finds_a_planted_bug() -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python or platform")
    command = [sys.executable, "-m", "tests.fuzzing.worker", "contents", "3000", "1"]
    bug = "wrong bit count accepted"
    result = subprocess.run([*command, bug], capture_output=True, text=True)
    assert result.returncode == 77, result.stderr[-2000:]
    assert "a broken layer was accepted" in result.stdout + result.stderr
