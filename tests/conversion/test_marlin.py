"""`marlin-24` is read as compressed-tensors wrote it, which could not read it itself."""

import pytest
import torch

from permllm_offline.conversion.marlin import (
    mask_of,
    unpack_places,
    unpack_scales,
    unpack_tiles,
)
from tests.conversion.compressed_tensors import written
from tests.conversion.marlin_models import (
    packed_integers,
    packed_places,
    packed_scales,
    without_zeros,
)

CASES = ("4_by_channel", "4_by_group", "4_by_two_groups", "8_by_channel", "8_by_group")


@pytest.mark.parametrize("case", CASES)
def test_what_compressed_tensors_wrote(case: str) -> None:
    found = written(case)
    integers, places = found["integers"], unpack_places(found["meta"])
    kept = unpack_tiles(found["weight_packed"], int(case[0]))
    assert kept.dtype == torch.int8
    dense = torch.zeros_like(integers).masked_scatter_(mask_of(places), kept)
    assert torch.equal(dense, integers)
    assert torch.equal(unpack_scales(found["scale_packed"], integers.shape[1]), found["scale"])


@pytest.mark.parametrize("case", CASES)
def test_the_plain_writer_of_these_tests_agrees(case: str) -> None:
    found = written(case)
    kept, places = without_zeros(found["integers"].tolist())
    # Of groups with fewer than two weights, others place zeros elsewhere.
    full = (found["integers"].view(-1, 16, 4) != 0).sum(2).eq(2).all(1)
    mine, theirs = (
        unpack_places(one).view(-1, 32)[full] for one in (packed_places(places), found["meta"])
    )
    assert len(mine) > len(full) // 2
    assert torch.equal(mine, theirs)
    assert unpack_places(packed_places(places)).tolist() == places
    unpacked = unpack_tiles(packed_integers(kept, int(case[0])), int(case[0]))
    assert torch.equal(unpacked, torch.tensor(kept, dtype=torch.int8))
    scales = packed_scales(found["scale"], found["integers"].shape[1])
    assert torch.equal(scales, found["scale_packed"])
