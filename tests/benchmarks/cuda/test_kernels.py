"""What the GPU benchmark compares with, and what it says; nothing is timed here."""

import pytest
import torch

from benchmarks.cuda import contestants as cuda_contestants
from benchmarks.cuda import kernels as cuda_kernels
from benchmarks.cuda.contestants import CONTESTANTS, DENSE, OURS, FastestAlgorithm
from benchmarks.cuda.kernels import Row, slower_than_dense, table
from benchmarks.shapes import random_layer


def row(tokens, contestant, us):
    return Row(64, 128, tokens, contestant, us, floor_us=1.0, relative_error=1e-3)


def test_says_where_ours_is_slower_than_dense():
    rows = [
        *(row(1, name, us) for name, us in ((OURS, 2.0), (DENSE, 3.0))),
        *(row(64, name, us) for name, us in ((OURS, 5.0), (DENSE, 4.0), ("other", 9.0))),
        row(128, OURS, 7.0),
    ]
    assert slower_than_dense(rows) == {(64, 128, 64)}
    remarks = {
        line.split()[3]: line.endswith("slower than dense") for line in table(rows).splitlines()
    }
    assert remarks == {"tokens": False, "1": False, "64": True, "128": False}


def test_searches_an_algorithm_for_every_number_of_tokens(monkeypatch):
    searched = []

    def search(compressed, x, transpose_result):
        assert transpose_result
        searched.append(x.shape)
        return len(searched)

    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    fastest = FastestAlgorithm()
    compressed = torch.zeros(1)
    found = [fastest(n, compressed, torch.zeros(m, 64)) for n, m in ((8, 8), (8, 16), (16, 8)) * 2]
    assert found == [1, 2, 3] * 2
    assert searched == [(64, 8), (64, 16), (64, 8)]


def test_pytorchs_cutlass_is_not_cusparselt(monkeypatch):
    """to_sparse_semi_structured would take cuSPARSELt, of which there is a row already."""
    asked = []
    monkeypatch.setattr(cuda_contestants, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(
        torch.sparse.SparseSemiStructuredTensorCUTLASS,
        "from_dense",
        lambda w: asked.append(w.shape),
    )
    CONTESTANTS["permute + pytorch cutlass"](random_layer(64, 128))
    assert asked == [(64, 128)]


@pytest.mark.parametrize("tensor_bytes", [1 << 10, 16 << 20, 1 << 30])
def test_copies_do_not_fit_the_cache(monkeypatch, tensor_bytes):
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    copies = cuda_kernels.copies(tensor_bytes)
    assert copies >= 8
    assert copies * tensor_bytes >= 4 * Properties.L2_cache_size


def test_the_papers_permutation_is_measured():
    assert (2048, 4096) in cuda_kernels.PERMUTED
