import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permllm_vllm.forecast import Measurement, instruction_set, packaged

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PACKAGED = {
    ("avx512_bf16", "2:4"): "kernels-cpu-zen4.json",
    ("avx512_bf16", "4:8"): "kernels-cpu-zen4-4to8.json",
    ("zen5", "2:4"): "kernels-cpu-zen5.json",
    ("zen5", "4:8"): "kernels-cpu-zen5-4to8.json",
    ("avx2", "2:4"): "kernels-cpu-zen3.json",
    ("avx2", "4:8"): "kernels-cpu-zen3-4to8.json",
    ("amx", "2:4"): "kernels-cpu-amx.json",
    ("amx", "4:8"): "kernels-cpu-amx-4to8.json",
}


def row(n, k, m, peer_us, ours_us, **changes):
    return {
        "n": n, "k": k, "m": m, "pattern": "2:4", "value_dtype": "bfloat16", "threads": 1,
        "peer_values": "bfloat16", "peer_us": peer_us, "ours_us": ours_us, **changes,
    }  # fmt: skip


@pytest.fixture
def measurement(tmp_path):
    rows = [row(1024, 1024, m, 100.0 * m, 40.0 * m) for m in (1, 4, 16)]
    rows += [row(1024, 1024, m, 110.0 * m, 40.0 * m, peer="slower") for m in (1, 4, 16)]
    rows += [row(1024, 1024, m, 50.0 * m, 40.0 * m, peer_values="int8") for m in (1, 4, 16)]
    rows += [row(4096, 1024, m, 400.0 * m, 100.0 * m) for m in (1, 4, 16)]
    rows += [row(1024, 1024, 1, 1.0, 1.0, threads=2), row(1024, 1024, 1, 1.0, 1.0, pattern="4:8")]
    rows += [row(1024, 1024, 1, 100.0, 20.0, value_dtype="int8")]
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"date": "2026-01-02", "machine": {"cpu": "A chip"}, "rows": rows}))
    return Measurement.read(file, "2:4")


def test_what_was_measured_comes_back(measurement):
    found = measurement.forecast(1024, 1024, 4, "bfloat16")
    assert found.dense_us == pytest.approx(400, rel=1e-3)
    assert found.sparse_us == pytest.approx(160, rel=1e-3)
    assert found.ratio == pytest.approx(2.5, rel=1e-3)
    assert found.inside
    assert found.source == "A chip, 2026-01-02"
    assert measurement.forecast(1024, 1024, 1, "int8").ratio == pytest.approx(5)


def test_between_shapes_and_tokens(measurement):
    found = measurement.forecast(2048, 1024, 8, "bfloat16")
    assert found.dense_us == pytest.approx(1600)
    assert found.ratio == pytest.approx((2.5 * 4) ** 0.5)


@given(st.integers(8, 1 << 16), st.integers(8, 1 << 16), st.integers(1, 5000))
def test_ratios_stay_between_the_measured_ones(n, k, m):
    times = {"bfloat16": {(64, 64): {1: (3.0, 1.0), 64: (9.0, 8.0)}, (999, 7): {16: (5.0, 4.0)}}}
    found = Measurement("", "2:4", times).forecast(n, k, m, "bfloat16")
    assert 9 / 8 - 1e-9 <= found.ratio <= 3 + 1e-9
    assert found.ratio == pytest.approx(found.dense_us / found.sparse_us)


def test_outside_is_said(measurement):
    assert not measurement.forecast(1024, 1024, 17, "bfloat16").inside
    assert not measurement.forecast(256, 256, 1, "bfloat16").inside
    assert not measurement.forecast(40960, 1024, 1, "bfloat16").inside


def test_more_tokens_than_measured_take_proportionally_longer(measurement):
    assert measurement.forecast(1024, 1024, 160, "bfloat16").dense_us == pytest.approx(
        16000, rel=1e-3
    )


def test_nothing_is_made_up(measurement, tmp_path):
    assert measurement.forecast(1024, 1024, 1, "float16") is None
    assert packaged("abacus", "2:4") is None
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"rows": [row(8, 8, 1, 1.0, 1.0, threads=2)]}))
    with pytest.raises(ValueError, match=r"other\.json holds no rows of one thread"):
        Measurement.read(file, "2:4")


def test_each_pattern_has_its_own_times(tmp_path):
    rows = [row(64, 64, 1, 9.0, 3.0), row(64, 64, 1, 8.0, 4.0, pattern="4:8")]
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"date": "2026-01-02", "machine": {"cpu": "A chip"}, "rows": rows}))
    for pattern, ratio in (("2:4", 3), ("4:8", 2)):
        found = Measurement.read(file, pattern)
        assert found.pattern == pattern
        assert found.forecast(64, 64, 1, "bfloat16").ratio == pytest.approx(ratio)


def test_a_pattern_without_rows_has_those_of_another_which_says_so(tmp_path):
    file = tmp_path / "result.json"
    rows = [row(64, 64, 1, 9.0, 3.0)]
    file.write_text(json.dumps({"date": "2026-01-02", "machine": {"cpu": "A chip"}, "rows": rows}))
    found = Measurement.read(file, "4:8")
    assert found.pattern == "2:4"
    assert found.forecast(64, 64, 1, "bfloat16").ratio == pytest.approx(3)


@pytest.mark.parametrize(("isa", "pattern"), PACKAGED)
@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_what_is_packaged_is_the_record_of_the_pattern(isa, pattern, values):
    measured = packaged(isa, pattern)
    assert measured.pattern == pattern
    record = json.loads((RESULTS / PACKAGED[isa, pattern]).read_text())
    assert record["isa"] == isa
    for m in (1, 64):
        ratios = [
            found["peer_us"] / found["ours_us"]
            for found in record["rows"]
            if (found["n"], found["k"], found["m"]) == (12288, 4096, m)
            and (found["value_dtype"], found["peer_values"]) == (values, "bfloat16")
        ]
        assert len(ratios) == 2
        found = measured.forecast(12288, 4096, m, values)
        assert found.ratio == pytest.approx(min(ratios), rel=1e-3)


def test_instruction_set_of_a_processor(tmp_path):
    file = tmp_path / "cpuinfo"
    assert instruction_set(file) == ""
    zen4 = "avx512_bf16 avx512_vnni avx512_vbmi2 avx512bw avx512vl avx2"
    file.write_text(f"processor : 0\nflags : fpu {zen4}\nflags : {zen4}\n")
    assert instruction_set(file) == "avx512_bf16"
    amd = "vendor_id : AuthenticAMD\ncpu family : {}\nflags : " + zen4
    file.write_text(amd.format(25))
    assert instruction_set(file) == "avx512_bf16"
    file.write_text(amd.format(26))
    assert instruction_set(file) == "zen5"
    file.write_text(f"flags : {zen4} amx_tile amx_bf16 amx_int8\n")
    assert instruction_set(file) == "amx"
    zen3 = "fma f16c bmi1 bmi2 avx2"
    file.write_text(f"flags : {zen3}\n")
    assert instruction_set(file) == "avx2"
    for other in ("fpu avx2", f"{zen3} avx512f", f"{zen3} avx_vnni"):
        file.write_text(f"flags : {other}\n")
        assert instruction_set(file) == ""


def test_imports_nothing_heavy():
    code = (
        "import sys, permllm_vllm.forecast\n"
        "print(sorted({'torch', 'vllm', 'numpy', 'permllm_vllm.ops'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
