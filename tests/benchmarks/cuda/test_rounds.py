"""In which order the GPU benchmark measures, and what it says where time was short."""

import json

import pytest
import torch

from benchmarks.cuda import INCOMPLETE, card
from benchmarks.cuda import kernels as cuda_kernels
from benchmarks.cuda.contestants import CONTESTANTS, DENSE, INT8, OURS, OWN
from benchmarks.cuda.kernels import CORE, TOKENS, passes
from benchmarks.cuda.rows import Row, lines_of, missing
from benchmarks.cuda.turns import CaptureError

PEER = "transposed"


def row(tokens, contestant, us):
    return Row(64, 128, tokens, contestant, us, floor_us=1.0, relative_error=1e-3)


def test_only_peers_may_be_missing():
    rows = [row(1, OURS, 1.0), row(1, DENSE, 1.0), row(8, OURS, 1.0)]
    shape, names = (64, 128), [OURS, DENSE, "peer"]
    all_tried = {(*shape, m, name) for m in (1, 8, 16) for name in names}

    def lacking(shapes, tokens, names, tried=all_tried):
        return missing(rows, tried, shapes, tokens, names)

    assert lacking([shape], [1, 8], names) == []
    assert lacking([shape], [1, 8, 16], names) == [(*shape, 16, OURS)]
    assert (8, 128, 1, OURS) in lacking([shape, (8, 128)], [1], names)
    assert lacking([shape], [1, 8], [DENSE]) == [(*shape, 8, DENSE)]
    assert lacking([shape], [1], [OURS, INT8]) == [(*shape, 1, INT8)]
    # But one that was not tried is missing.
    tried = all_tried - {(*shape, 1, "peer")}
    assert lacking([shape], [1, 8], names, tried) == [(*shape, 1, "peer")]


def test_what_is_missing_takes_few_lines():
    cases = [(8, 128, m, name) for m in (1, 4) for name in ("a", "b")]
    cases += [(8, 128, 8, "b"), (16, 128, 1, "a")]
    assert lines_of(cases) == [
        "8 x 128, 1, 4 tokens: a", "8 x 128, 1, 4, 8 tokens: b", "16 x 128, 1 tokens: a"
    ]  # fmt: skip
    assert lines_of(cases[:4]) == ["8 x 128, 1, 4 tokens: a; b"]


def test_ours_and_cublas_come_before_peers_and_some_tokens_before_others():
    ours = [*OWN, DENSE]
    everyone = list(CONTESTANTS)
    others = [m for m in TOKENS if m not in CORE]
    assert passes(TOKENS, everyone) == [
        ([*CORE], ours), (others, ours), ([*CORE], everyone), (others, everyone)
    ]  # fmt: skip
    assert passes([4, 8], [OURS, DENSE]) == [([8], [OURS, DENSE]), ([4], [OURS, DENSE])]
    assert passes([4], ["peer"]) == [([4], ["peer"])]
    assert {*CORE} < {*TOKENS}


@pytest.fixture
def pretended(replays, monkeypatch):
    """What a run does with a GPU, without one; returns the turns that were taken."""
    monkeypatch.setattr(card, "fallback_reason", lambda *_: None)
    monkeypatch.setattr(card, "bandwidth", lambda: 1.0)
    monkeypatch.setattr(cuda_kernels, "PERMUTED", ())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    return replays


@pytest.fixture
def measured(pretended, monkeypatch):
    """The shapes, tokens and contestants that are measured, each pretended to take a second."""
    log, now = [], [0.0]

    def measure(layer, tokens, names, speed):
        for m in tokens:
            n, k = layer.dense.shape
            log.append((n, m, len(names)))
            now[0] += 1
            yield [Row(n, k, m, name, len(log), 1.0, 0.0) for name in names]

    monkeypatch.setattr(cuda_kernels, "measure", measure)
    monkeypatch.setattr(cuda_kernels.time, "monotonic", lambda: now[0])
    return log


ASKED = [(8, 128), (16, 128)], [4, 8], [OURS, DENSE, PEER]


def test_every_shape_has_rows_before_any_has_all(measured, tmp_path):
    drawn = []
    draw = cuda_kernels.random_layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cuda_kernels, "random_layer", lambda *s, **on: drawn.append(s) or draw(*s, **on)
        )
        cuda_kernels.run(*ASKED, tmp_path / "kernels.json")
    order = [(tokens, names) for names in (2, 3) for tokens in (8, 4)]
    assert measured == [(n, m, names) for m, names in order for n in (8, 16)]
    assert drawn == ASKED[0]  # once each
    written = json.loads((tmp_path / "kernels.json").read_text())
    times = {(row["n"], row["tokens"], row["contestant"]): row["us"] for row in written["rows"]}
    assert len(times) == len(written["rows"]) == 12
    assert written["left_out"] == []
    for n, m in ((8, 8), (16, 8), (8, 4), (16, 4)):  # of the same turns
        assert times[n, m, OURS] == times[n, m, DENSE] == times[n, m, PEER] > 4


@pytest.mark.parametrize("seconds", range(8))
def test_what_a_short_time_leaves_out_is_said_and_written(measured, tmp_path, capsys, seconds):
    file = tmp_path / "kernels.json"
    with pytest.raises(SystemExit) as exit_:
        cuda_kernels.run(*ASKED, file, seconds=seconds - 0.5)
    assert exit_.value.code == INCOMPLETE
    assert len(measured) == seconds
    written = json.loads(file.read_text())
    assert len(written["rows"]) == 2 * min(seconds, 4) + max(seconds - 4, 0)
    printed = capsys.readouterr().out.split("left out:\n  ")[1].splitlines()
    assert [line.strip() for line in printed] == written["left_out"]
    if seconds >= 4:
        assert {line.partition("tokens: ")[2] for line in written["left_out"]} == {PEER}


def test_what_cannot_be_captured_is_not_tried_in_later_rounds(pretended, monkeypatch):
    tried = []

    def fails(calls, inputs):
        tried.append(len(inputs[0]))
        raise CaptureError("operation not permitted")

    monkeypatch.setattr(cuda_kernels, "captured", fails)
    with pytest.raises(SystemExit):
        cuda_kernels.run([(64, 128)], [4, 8], [OURS])
    assert tried == [8]


def test_a_peer_that_is_not_there_fails_no_run(pretended, capsys):
    cuda_kernels.run([(64, 128)], [4], [OURS, DENSE, "missing"])
    assert "left out" not in capsys.readouterr().out


def test_results_are_kept_after_each_number_of_tokens(pretended, monkeypatch, tmp_path):
    file = tmp_path / "kernels.json"
    seen = []

    def relative_error(y, x, dense):
        seen.append(len(json.loads(file.read_text())["rows"]))
        return 0.0

    monkeypatch.setattr(cuda_kernels, "relative_error", relative_error)
    cuda_kernels.run([(64, 128)], [4, 8, 16], [OURS, DENSE], file)
    assert seen == [0, 0, 2, 2, 4, 4]
    rows = json.loads(file.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [8, 8, 16, 16, 4, 4]
