"""What the GPU benchmark compares with, and what it says; nothing is timed here."""

import contextlib
from itertools import chain

import pytest
import torch

from benchmarks.cuda import contestants as cuda_contestants
from benchmarks.cuda import kernels as cuda_kernels
from benchmarks.cuda.contestants import (
    CONTESTANTS,
    DENSE,
    INT8,
    OURS,
    OWN,
    PASS,
    FastestAlgorithm,
    with_values_of,
)
from benchmarks.cuda.kernels import ERROR_LIMIT, measure
from benchmarks.cuda.rows import Row, slower_than_dense, table
from benchmarks.cuda.turns import LEAST_CALLS, CaptureError, captured, medians, rotation
from benchmarks.shapes import random_layer
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.checkpoint import permutation as permutations


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

    monkeypatch.delattr(torch._C, "_cusparselt", raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    fastest = FastestAlgorithm()
    compressed = torch.zeros(1)
    found = [fastest(n, compressed, torch.zeros(m, 64)) for n, m in ((8, 8), (8, 16), (16, 8)) * 2]
    assert found == [{"alg_id": number} for number in (1, 2, 3)] * 2
    assert searched == [(64, 8), (64, 16), (64, 8)]


@pytest.mark.parametrize("answer", [(5,), (5, 2), (5, 2, 1), (5, 2, 1, 7), (5, 2, 1, 7, 9)])
def test_takes_the_split_that_the_search_has_found(monkeypatch, answer):
    """What is public of it returns the algorithm alone, which may be no fastest without a split."""
    given = []

    def mm_search(compressed, x, bias, alpha, out_dtype, transpose_result):
        assert (bias, alpha, out_dtype, transpose_result) == (None, None, None, True)
        return answer

    def multiply(weight, x, *, transpose_result, **settings):
        assert transpose_result
        given.append(settings)
        return torch.zeros(x.shape[1], 64)

    bindings = type("Bindings", (), {"mm_search": staticmethod(mm_search)})
    monkeypatch.setattr(torch._C, "_cusparselt", bindings, raising=False)
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(cuda_contestants, "_fastest_algorithm", FastestAlgorithm())
    monkeypatch.setattr(
        torch.ops.permllm, "permute_inputs", lambda x, places: x[:, places.long()], raising=False
    )
    (call,) = CONTESTANTS["permute + cusparselt"](random_layer(64, 128), 1)
    assert call(torch.zeros(5, 128).bfloat16()).shape == (5, 64)
    names = ("alg_id", "split_k", "split_k_mode")
    assert given == [dict(zip(names, answer, strict=False))]
    parameters = torch.ops.aten._cslt_sparse_mm.default._schema.arguments
    assert {*names} <= {parameter.name for parameter in parameters}


def test_pytorchs_cutlass_is_not_cusparselt(monkeypatch):
    """to_sparse_semi_structured would take cuSPARSELt, of which there is a row already."""
    asked = []
    monkeypatch.setattr(cuda_contestants, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(
        torch.sparse.SparseSemiStructuredTensorCUTLASS,
        "from_dense",
        lambda w: asked.append(w.shape),
    )
    CONTESTANTS["permute + pytorch cutlass"](random_layer(64, 128), 2)
    assert asked == [(64, 128)] * 2


def test_pytorchs_cutlass_is_left_out_once_where_it_refuses_the_gpu(replays, monkeypatch, capsys):
    """And no weight is compressed for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensorCUTLASS, "from_dense", None)
    names = [OURS, "permute + pytorch cutlass"]
    for _ in range(2):
        ((row,),) = measure(random_layer(64, 128), [4], names, speed=1.0)
        assert row.contestant == OURS
    assert names == [OURS]
    said = "no permute + pytorch cutlass: it takes compute capability 8.x, this GPU has 9.0"
    assert capsys.readouterr().out.count(said) == 1


def test_the_pass_comes_before_a_product_without_permutation(monkeypatch):
    """Also where the operator would permute itself, which it is then compared with."""
    layer = random_layer(24, 128)
    absolute = permutations.absolute(layer.weights.permutation, 64)

    def multiply(x, packed, metadata, permutation, scale, bias, rows, pattern):
        assert permutation is None
        return x

    monkeypatch.setattr(cuda_contestants, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(
        torch.ops.permllm, "permute_inputs", lambda x, places: x[:, places.long()], raising=False
    )
    monkeypatch.setattr(cuda_contestants.ops, "sparse_linear", multiply)
    x = torch.randn(3, 128).bfloat16()
    for call in CONTESTANTS[PASS](layer, 3):
        assert torch.equal(call(x), x[:, absolute])


@pytest.mark.parametrize("name", [OURS, INT8])
def test_a_weight_is_packed_once_and_copied(monkeypatch, name):
    """Each copy in a place of its own, so that the cache does not have it yet."""
    packed, given = [], []

    class Backend(CudaBackend):
        def pack(self, weights):
            packed.append(super().pack(weights))
            return packed[-1]

    monkeypatch.setattr(cuda_contestants, "CudaBackend", Backend)
    monkeypatch.setattr(cuda_contestants.ops, "sparse_linear", lambda x, *rest: given.append(rest))
    for call in CONTESTANTS[name](with_values_of(name, random_layer(24, 128)), 3):
        call(torch.randn(3, 128).bfloat16())
    assert len(packed) == 1
    one = packed[0]
    expected = (one.packed, one.metadata, one.permutation, one.scale)
    for rest in given:
        for copy, tensor in zip(rest, expected, strict=False):
            assert tensor is copy is None or torch.equal(copy, tensor)
    for tensors in ([rest[i] for rest in given] for i in range(2)):
        assert len({tensor.data_ptr() for tensor in tensors}) == 3


def test_dense_weights_are_copies_too():
    layer = random_layer(8, 128)
    x = torch.eye(128).bfloat16()
    calls = CONTESTANTS[DENSE](layer, 2)
    layer.dense.zero_()
    assert all(call(x).any() for call in calls)


@pytest.mark.parametrize("tensor_bytes", [1 << 10, 16 << 20, 1 << 30])
def test_copies_do_not_fit_the_cache(monkeypatch, tensor_bytes):
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    copies = cuda_kernels.copies(tensor_bytes)
    assert copies >= 8
    assert copies * tensor_bytes >= 4 * Properties.L2_cache_size


def test_contestants_take_turns_and_the_first_round_does_not_count():
    log = []
    times = {"a": [90.0, 3.0, 1.0, 8.0], "b": [80.0, 5.0, 6.0, 4.0]}

    def turn(name):
        def taken():
            log.append(name)
            return times[name].pop(0)

        return taken

    assert medians({name: turn(name) for name in times}, 3) == {"a": 3.0, "b": 5.0}
    assert log == ["a", "b"] * 4


@pytest.mark.parametrize(("calls", "inputs"), [(2, 1), (8, 8), (31, 31), (200, 200)])
def test_a_graph_makes_whole_rounds_and_many_calls(calls, inputs):
    order = rotation(calls, inputs)
    assert LEAST_CALLS <= len(order) < LEAST_CALLS + calls
    assert [call for call, _ in order] == [*range(calls)] * (len(order) // calls)
    assert [given for _, given in order] == [*range(inputs)] * (len(order) // inputs)


def test_a_shape_is_measured_in_turns(replays, capsys):
    names = [OURS, DENSE, "missing", "transposed"]
    rows = list(chain(*measure(random_layer(64, 128), [4, 8], names, speed=1.0)))
    assert [(row.tokens, row.contestant) for row in rows] == [
        (4, OURS), (4, DENSE), (8, OURS), (8, DENSE)
    ]  # fmt: skip
    assert replays == [(name, m) for m in (4, 8) for _ in range(16) for name in (OURS, DENSE)]
    assert (rows[0].us, rows[1].us) == (17.0, 18.0)  # medians of 3, 5, .. 31 and of 4, 6, .. 32
    printed = capsys.readouterr().out
    assert "64 x 128: no missing: no such library\n" in printed
    assert "64 x 128, 4 tokens: no transposed: its relative error is 1." in printed


def test_what_fails_in_a_capture_is_not_tried_again(replays, monkeypatch, capsys):
    tried, names = [], [OURS, DENSE]
    captured = cuda_kernels.captured

    def fails(calls, inputs):
        tried.append(len(inputs[0]))
        if len(tried) == 2:  # cuBLAS
            raise CaptureError("operation not permitted when stream is capturing")
        return captured(calls, inputs)

    monkeypatch.setattr(cuda_kernels, "captured", fails)
    rows = list(chain(*measure(random_layer(64, 128), [4, 8], names, speed=1.0)))
    assert [(row.tokens, row.contestant) for row in rows] == [(4, OURS), (8, OURS)]
    assert tried == [4, 4, 8]
    assert names == [OURS]
    assert f"64 x 128, 4 tokens: no {DENSE}: operation not permitted" in capsys.readouterr().out


def test_our_own_and_cublas_come_first():
    assert list(CONTESTANTS)[: len(OWN) + 1] == [*OWN, DENSE]


@pytest.fixture
def streams(monkeypatch):
    """Graphs without a GPU: the name of the current stream, alone in a list."""
    current = ["the stream"]

    class Stream:
        def __init__(self, name=""):
            self.name = name

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(_):
        current[0] = "of the capture"
        yield
        current[0] = "the stream"

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(current[0]))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda to: current.__setitem__(0, to.name))
    return current


def test_a_graph_holds_its_calls_in_turn(streams):
    made = []
    calls = [lambda x, name=name: made.append((name, x, *streams)) for name in range(20)]
    captured(calls, range(100, 120))
    in_graph = [(name, x) for name, x, stream in made if stream == "of the capture"]
    assert in_graph == [(name, 100 + name) for name in range(20)] * 2


def test_a_capture_that_fails_leaves_the_stream_as_it_was(streams):
    """PyTorch does not, where it cannot end the capture, as here."""

    def fails(x):
        if streams == ["of the capture"]:
            raise RuntimeError("capture was invalidated")

    with pytest.raises(CaptureError, match="invalidated"):
        captured([fails], [torch.zeros(1)])
    assert streams == ["the stream"]


def test_activations_are_copied_once_for_all_contestants(replays, monkeypatch):
    """They take gigabytes, and must still be there when the first contestant is replayed."""
    given = []
    captured = cuda_kernels.captured

    def remembered(calls, inputs):
        given.append(inputs)
        return captured(calls, inputs)

    monkeypatch.setattr(cuda_kernels, "captured", remembered)
    list(measure(random_layer(64, 128), [4, 8], [OURS, DENSE], speed=1.0))
    places = [[x.data_ptr() for x in inputs] for inputs in given]
    assert [len(inputs[0]) for inputs in given] == [4, 4, 8, 8]
    assert places[0] == places[1]
    assert places[2] == places[3]


def test_int8_is_held_against_the_rounded_weight(replays, monkeypatch, capsys):
    ((row,),) = measure(random_layer(64, 128), [4], [INT8], speed=1.0)
    assert row.relative_error < ERROR_LIMIT
    exact = random_layer(64, 128).dense.float()
    calls = [lambda x: (x.float() @ exact.t()).bfloat16()]
    monkeypatch.setitem(CONTESTANTS, INT8, lambda *_: calls)
    assert list(measure(random_layer(64, 128), [4], [INT8], speed=1.0)) == [[]]
    assert f"no {INT8}: its relative error is" in capsys.readouterr().out


def test_every_tile_and_place_is_looked_at(replays, monkeypatch):
    """Kernels write tiles: what is wrong may be the last one, or one place in each."""

    def spoiled(outputs, tokens):
        def prepare(layer, count):
            def call(x):
                y = x.float() @ layer.dense.float().t()
                y[tokens, outputs] = 0
                return y.bfloat16()

            return [call] * count

        return prepare

    whole, last, odd = slice(None), slice(-64, None), slice(1, None, 8)
    for outputs, tokens in ((last, whole), (whole, last), (odd, whole), (whole, odd)):
        monkeypatch.setitem(CONTESTANTS, DENSE, spoiled(outputs, tokens))
        assert list(measure(random_layer(4096, 128), [512], [DENSE], speed=1.0)) == [[]]


def test_the_papers_permutation_is_measured():
    assert (2048, 4096) in cuda_kernels.PERMUTED
