import json
import re
from pathlib import Path

import pytest

from permllm_offline.cli import main
from permllm_offline.commands.plan_tables import speed_table
from permllm_offline.commands.tables import show
from permllm_offline.forecast.outline import ServedShape
from permllm_offline.forecast.speedup import TOKENS, expected_speed
from permllm_vllm import forecast

SHAPES = [ServedShape("o_proj", 100, 50, 3), ServedShape("down_proj", 10, 20, 1)]


def write_measurement(path: Path, value_dtype: str = "bfloat16", pattern: str = "2:4") -> Path:
    """Dense takes 4 times as long as sparse at (100, 50), and twice as long at (10, 20)."""
    rows = [
        {
            "n": n,
            "k": k,
            "m": m,
            "pattern": pattern,
            "value_dtype": value_dtype,
            "threads": 1,
            "peer_values": "bfloat16",
            "peer_us": dense,
            "ours_us": sparse,
        }
        for n, k, dense, sparse in ((100, 50, 400.0, 100.0), (10, 20, 60.0, 30.0))
        for m in TOKENS
    ]
    record = {"machine": {"cpu": "a CPU"}, "date": "2026-01-02", "rows": rows}
    path.write_text(json.dumps(record))
    return path


def test_measured_shapes_are_forecast_as_they_were_measured(tmp_path: Path) -> None:
    speed = expected_speed(SHAPES, "2:4", "bfloat16", write_measurement(tmp_path / "m.json"))
    assert (speed.source, speed.pattern, speed.reason) == ("a CPU, 2026-01-02", "2:4", "")
    for one, ratio in zip(speed.shapes, (4, 2), strict=True):
        for m in TOKENS:
            assert one.forecasts[m].ratio == pytest.approx(ratio, rel=1e-3)
    assert speed.whole_inside() == dict.fromkeys(TOKENS, True)
    whole = (3 * 400 + 60) / (3 * 100 + 30)
    assert speed.whole() == pytest.approx(dict.fromkeys(TOKENS, whole), rel=1e-3)


def test_a_dtype_that_was_not_measured_says_so(tmp_path: Path) -> None:
    speed = expected_speed(SHAPES, "2:4", "int8", write_measurement(tmp_path / "m.json"))
    assert not speed.shapes
    assert speed.whole() == speed.whole_inside() == {}
    assert "measured no int8 values" in speed.reason
    assert "python -m benchmarks.kernels --device cpu" in speed.reason


@pytest.mark.parametrize("isa", ["", "amx_of_the_future"])
def test_a_cpu_without_a_measurement_says_so(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERMLLM_CPU_ISA", raising=False)
    monkeypatch.setattr(forecast, "instruction_set", lambda: isa)
    speed = expected_speed(SHAPES, "2:4", "bfloat16")
    assert not speed.shapes
    assert re.search(rf"no measurement .*{isa}.* is packaged: measure this machine", speed.reason)
    assert "python -m benchmarks.kernels --device cpu" in speed.reason


def test_a_cpu_that_is_told_to_serve_with_another_instruction_set_is_forecast_with_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forecast, "instruction_set", lambda: "avx512_bf16")
    monkeypatch.setenv("PERMLLM_CPU_ISA", "avx2_vnni")
    speed = expected_speed(SHAPES, "2:4", "bfloat16")
    assert not speed.shapes
    assert "no measurement of avx2_vnni, which PERMLLM_CPU_ISA names, is packaged" in speed.reason
    monkeypatch.setenv("PERMLLM_CPU_ISA", "avx512_bf16")
    assert ", avx512_bf16, " in expected_speed(SHAPES, "2:4", "bfloat16").source
    monkeypatch.setenv("PERMLLM_CPU_ISA", "")  # as unset, for the kernels too
    assert expected_speed(SHAPES, "2:4", "bfloat16").shapes


def test_the_total_of_extrapolated_rows_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = write_measurement(tmp_path / "m.json")
    lines = {}
    for name, size in (("inside", 100), ("one outside", 4000)):
        shapes = [ServedShape("o_proj", 100, 50, 1), ServedShape("down_proj", size, 50, 1)]
        speed = expected_speed(shapes, "2:4", "bfloat16", measured)
        assert speed.to_dict()["whole_inside"] == dict.fromkeys(TOKENS, size == 100)
        show(speed_table(speed, "2:4"))
        lines[name] = capsys.readouterr().out.splitlines()
    (total,) = (line for line in lines["one outside"] if "all pruned linears" in line)
    assert total.count("~") == len(TOKENS)
    assert any("~ extrapolated" in line for line in lines["one outside"])
    assert not any("~" in line for line in lines["inside"])
    for shown in lines.values():
        assert "without layers left dense, attention and the output head" in " ".join(shown)


def test_the_command_shows_and_writes_the_forecast(
    tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = write_measurement(tmp_path / "m.json")
    written = tmp_path / "plan.json"
    options = ("--values", "bfloat16", "--measured", str(measured), "--json", str(written))
    assert main(["plan", str(tiny_model_directory), *options]) == 0
    shown = capsys.readouterr().out
    assert "M = 256" in shown
    assert "gate_proj+up_proj" in shown
    speed = json.loads(written.read_text())["speed"]
    assert set(speed["whole"]) == {str(m) for m in TOKENS}
    assert all(2 < ratio < 4 for ratio in speed["whole"].values())
    assert len(speed["shapes"]) == 4


@pytest.mark.parametrize("measured", ["int8", "int4"])
def test_int4_values_are_as_fast_as_int8_where_they_were_not_measured(
    measured: str, tmp_path: Path, tiny_model_directory: Path
) -> None:
    file, written = write_measurement(tmp_path / "m.json", measured), tmp_path / "plan.json"
    plans = {}
    for values in ("int4", "int8"):
        options = ("--values", values, "--measured", str(file), "--json", str(written))
        assert main(["plan", str(tiny_model_directory), *options]) == 0
        plans[values] = json.loads(written.read_text())
    speeds = {values: plan.pop("speed") for values, plan in plans.items()}
    assert plans["int4"]["bytes_after"] < plans["int8"]["bytes_after"]
    assert speeds["int4"]["shapes"]
    assert ("int4 was not measured" in speeds["int4"]["note"]) == (measured == "int8")
    assert bool(speeds["int8"]["shapes"]) == (measured == "int8")


@pytest.mark.parametrize(
    ("measured", "title"),
    [("4:8", "speed of 4:8, x the"), ("2:4", "speed of 2:4 (4:8 was not measured), x the")],
)
def test_the_title_says_which_pattern_was_measured(
    measured: str,
    title: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_measurement(tmp_path / "m.json", pattern=measured)
    options = ("--values", "bfloat16", "--pattern", "4:8", "--measured", str(file))
    assert main(["plan", str(tiny_model_directory), *options]) == 0
    assert title in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_packaged_measurement_is_that_of_the_pattern(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERMLLM_CPU_ISA", "avx512_bf16")
    assert expected_speed(SHAPES, pattern, "int8").pattern == pattern


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"rows": [{"n": 1}]}'])
def test_a_file_that_is_no_measurement_is_bad_input(
    content: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "m.json").write_text(content)
    command = ["plan", str(tiny_model_directory), "--measured", str(tmp_path / "m.json")]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is no result of python -m benchmarks.kernels" in said
    assert said.endswith("Measure with that command, and give its file.")


def test_experts_multiply_the_tokens_that_come_to_them(tmp_path: Path) -> None:
    """8 of 64 experts for each token: of 16 tokens, 2.3 come to each of the 56 that get any."""
    file = write_measurement(tmp_path / "m.json")
    record = json.loads(file.read_text())
    for row in record["rows"]:
        row["peer_us"], row["ours_us"] = 100.0 * row["m"] ** 0.5, 20.0 + row["m"]
    file.write_text(json.dumps(record))
    measurement = forecast.Measurement.read(file, "2:4")
    experts, other = ServedShape("up_proj", 100, 50, 64, 0.125), ServedShape("o_proj", 10, 20, 1)
    speed = expected_speed([experts, other], "2:4", "bfloat16", file)
    for m, tokens in {1: 1, 4: 1, 16: 2, 64: 8, 256: 32}.items():
        expected = measurement.forecast(100, 50, tokens, "bfloat16")
        assert speed.shapes[0].forecasts[m] == expected
        assert speed.shapes[1].forecasts[m] == measurement.forecast(10, 20, m, "bfloat16")
    of_experts, of_other = (one.forecasts[16] for one in speed.shapes)
    busy = 64 * (1 - 0.875**16)
    whole = busy * of_experts.dense_us + of_other.dense_us
    assert speed.whole()[16] == pytest.approx(
        whole / (busy * of_experts.sparse_us + of_other.sparse_us)
    )
