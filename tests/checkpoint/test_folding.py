import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.folding import fold_rows, unfold_rows
from permllm_vllm.checkpoint.packing import pack_mask
from permllm_vllm.checkpoint.permutation import permute_columns


def random_permutation(block: int, blocks: int, seed: int) -> torch.Tensor:
    shuffle = random.Random(seed)
    entries = [e for _ in range(blocks) for e in shuffle.sample(range(block), block)]
    return torch.tensor(entries, dtype=torch.uint8)


@given(st.sampled_from([32, 64, 128]), st.integers(1, 3), st.integers(0, 2**31))
def test_rows_move_as_the_definition_says(block: int, blocks: int, seed: int) -> None:
    local = random_permutation(block, blocks, seed)
    rows = block * blocks
    mask = torch.rand(rows, 16) < 0.5
    for old in (torch.arange(rows), torch.randn(rows, 3), pack_mask(mask)):
        new = fold_rows(old, local, block)
        for j, entry in enumerate(local.tolist()):
            assert torch.equal(new[j], old[j // block * block + entry])
        assert torch.equal(unfold_rows(new, local, block), old)


def test_folding_down_into_gate_and_up_changes_nothing() -> None:
    """down(p(silu(gate) * up)) with p at run time equals the same with p in the rows."""
    torch.manual_seed(0)
    local = random_permutation(64, 2, 0)
    x = torch.randn(5, 32, dtype=torch.float64)
    gate, up = torch.randn(2, 128, 32, dtype=torch.float64)
    gate_bias, up_bias = torch.randn(2, 128, dtype=torch.float64)
    down = torch.randn(16, 128, dtype=torch.float64)

    def hidden(
        g: torch.Tensor, u: torch.Tensor, gb: torch.Tensor, ub: torch.Tensor
    ) -> torch.Tensor:
        return torch.nn.functional.silu(x @ g.T + gb) * (x @ u.T + ub)

    permuted_down = permute_columns(down, local, 64)
    at_run_time = permute_columns(hidden(gate, up, gate_bias, up_bias), local, 64) @ permuted_down.T
    folded = [fold_rows(tensor, local, 64) for tensor in (gate, up, gate_bias, up_bias)]
    torch.testing.assert_close(hidden(*folded) @ permuted_down.T, at_run_time)
    torch.testing.assert_close(at_run_time, hidden(gate, up, gate_bias, up_bias) @ down.T)


def test_sizes_must_agree() -> None:
    with pytest.raises(CheckpointError, match=r"has 64 channels in dimension 0.*128"):
        fold_rows(torch.zeros(64, 8), torch.arange(128, dtype=torch.uint8) % 64, 64)
