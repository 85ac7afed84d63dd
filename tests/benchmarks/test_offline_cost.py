"""Both loops take steps, prunes add up, results are kept, and options go together."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import offline_cost
from benchmarks.offline_cost import draw
from benchmarks.pruning import checkpoints, commands, pipeline_cost
from benchmarks.pruning.cost_tables import pipeline
from benchmarks.pruning.layer_step import LOOPS, measure_step
from benchmarks.pruning.pipeline_cost import METHODS
from benchmarks.pruning.prune_parts import PARTS, REST, parts, with_rest
from benchmarks.texts import Texts
from permllm_offline.cli import main
from permllm_offline.recipe import methods as known
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_of_each_loop_is_measured(loop: str) -> None:
    cost = measure_step(loop, 128, 16, 2)
    assert cost.seconds > 0
    assert 0 < cost.assignments <= 4


def step(name: str, seconds: float, peak_bytes: int | None) -> dict[str, Any]:
    processor = 2 * seconds
    return {
        "name": name,
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_bytes": peak_bytes,
    }


def test_steps_of_a_prune_add_up_to_parts() -> None:
    steps = [
        step("statistics", 4.0, 100),
        step("learned-0000", 1.5, 300),
        step("learned-0001", 2.0, 200),
        step("sparse-perplexity", 1.0, None),
    ]
    found = parts(steps, {"learning_curve": [{}] * 11, "reconstruction_curve": []})
    assert found == {
        "calibration": {"seconds": 4.0, "processor_seconds": 8.0, "peak_bytes": 100},
        "learning": {"seconds": 3.5, "processor_seconds": 7.0, "peak_bytes": 300, "steps": 10},
        "evaluation": {"seconds": 1.0, "processor_seconds": 2.0, "peak_bytes": 0},
    }
    row = {"processor_seconds": 20.0, "parts": found}
    assert with_rest(row) == {REST: 3.0, "calibration": 8.0, "learning": 7.0, "evaluation": 2.0}
    with pytest.raises(KeyError, match="other"):
        parts([step("other-0001", 1.0, None)], {})


def test_whole_prunes_are_measured_once_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(2000, seed=1), encoding="utf-8")
    texts = Texts(tmp_path / "text.txt", tmp_path / "none.txt")
    pruned: list[str] = []

    def here(*arguments: Any) -> None:
        words = [str(argument) for argument in arguments]
        pruned.append(words[words.index("--method") + 1])
        assert main(words) == 0

    monkeypatch.setattr(commands, "permllm_offline", here)
    monkeypatch.setattr(checkpoints, "smollm2", lambda: tmp_path / "model")
    monkeypatch.setattr(checkpoints, "sotu", lambda: texts)
    monkeypatch.setattr(pipeline_cost, "smollm2", lambda: tmp_path / "model")
    monkeypatch.setattr(pipeline_cost, "sotu", lambda: texts)
    methods = ("ria+cp", "wanda+cp/obs+distillation", "wanda+cp-global")
    monkeypatch.setattr(offline_cost, "METHODS", methods)
    result, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    command = ["offline_cost", "--pipeline", "--quick", "--json", str(result), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", *reversed(methods)])
    for _ in range(2):
        offline_cost.main()
        assert pruned == ["wanda+cp", "ria+cp"]
    first, second, third = json.loads(result.read_text())["rows"]
    assert list(first["parts"]) == ["calibration", "masks and updates", "evaluation"]
    assert list(second["parts"]) == [part for part in PARTS if part != "learning"]
    assert second["parts"]["distillation"]["steps"] == 1
    assert list(third["parts"]) == ["calibration", "masks and updates", "evaluation"]
    assert [row.get("checkpoint") for row in (first, second, third)] == [None, None, False]
    for row in (first, second, third):
        assert 0 < sum(part["seconds"] for part in row["parts"].values()) < row["seconds"]
        assert row["peak_bytes"] >= max(part["peak_bytes"] for part in row["parts"].values())
    drawn = plot.read_text(encoding="utf-8")
    assert "wanda+cp/obs+distillation" in drawn
    assert "text of its own" in drawn
    table = pipeline({"rows": [first, third]})
    assert "| `ria+cp` |" in table
    assert "| `wanda+cp-global` (no checkpoint) |" in table
    assert pipeline({"rows": [third]}).splitlines()[2].split(" | ")[3] == ""


def test_every_method_has_its_cost() -> None:
    assert {name.partition("/")[0] for name in METHODS} == set(known.METHODS)


class PretendedQuality:
    """Stands for the loops, which take minutes; counts what it is asked."""

    asked: ClassVar[list[str]] = []

    def __init__(self, seed: int, steps: int, *, quick: bool) -> None:
        self._steps = steps

    def measure(self, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "baseline" not in known:
            self.asked.append("dense loop")
            yield {"baseline": {"steps": self._steps, "perplexity": {"in domain": 80.0}}}
        self.asked.append("ours")
        yield {"ours": [{"steps": 5, "perplexity": {"in domain": 90.0}}]}
        yield {"reached": False}

    def references(self) -> dict[str, Any]:
        self.asked.append("references")
        return {"dense": {"in domain": 20.0}, "wanda": {"in domain": 160.0}}


def test_what_a_quality_result_has_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_cost, "QualityTime", PretendedQuality)
    output = tmp_path / "quality.json"
    offline_cost.measure_quality(output, 0, 40, quick=False)
    written = output.read_bytes()
    whole = json.loads(written)
    assert {"date", "machine", "versions", "model", "baseline", "references"} <= set(whole)
    assert whole["ratios"] == {
        "wanda": {"x dense": {"in domain": 8.0}, "x wanda": {"in domain": 1.0}},
        "baseline": {"x dense": {"in domain": 4.0}, "x wanda": {"in domain": 0.5}},
        "ours": [{"x dense": {"in domain": 4.5}, "x wanda": {"in domain": 0.5625}}],
    }
    offline_cost.measure_quality(output, 0, 40, quick=False)
    assert output.read_bytes() == written
    ratios = whole.pop("ratios")
    output.write_text(json.dumps(whole | {"date": "2030-01-02"}))
    offline_cost.measure_quality(output, 0, 40, quick=False)
    assert json.loads(output.read_text())["ratios"] == ratios
    del whole["references"]
    output.write_text(json.dumps(whole | {"date": "2030-01-02"}))
    offline_cost.measure_quality(output, 0, 40, quick=False)
    assert json.loads(output.read_text())["date"] == "2030-01-02"
    assert PretendedQuality.asked == ["dense loop", "ours", "references", "references"]


def test_a_loop_that_was_stopped_leaves_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(PretendedQuality):
        def measure(self, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
            yield next(super().measure(known))
            raise KeyboardInterrupt

    output = tmp_path / "quality.json"
    monkeypatch.setattr(PretendedQuality, "asked", [])
    monkeypatch.setattr(offline_cost, "QualityTime", Stopped)
    with pytest.raises(KeyboardInterrupt):
        offline_cost.measure_quality(output, 0, 40, quick=False)
    kept = json.loads(output.read_text())["baseline"]
    monkeypatch.setattr(offline_cost, "QualityTime", PretendedQuality)
    offline_cost.measure_quality(output, 0, 40, quick=False)
    found = json.loads(output.read_text())
    assert (found["baseline"], found["reached"]) == (kept, False)
    assert PretendedQuality.asked == ["dense loop", "ours", "references"]


def changed(result: dict[str, Any], part: str, field: str) -> dict[str, Any]:
    return {**result, part: {**result[part], field: ["abacus"]}}


def test_a_quality_result_goes_on_only_where_it_is_comparable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline_cost, "QualityTime", PretendedQuality)
    monkeypatch.setattr(PretendedQuality, "asked", [])
    output = tmp_path / "quality.json"
    offline_cost.measure_quality(output, 0, 40, quick=False)
    whole = json.loads(output.read_text())
    for seed, steps, quick, word in (
        (1, 40, False, "seed 0, this run has 1"),
        (0, 41, False, "steps 40, this run has 41"),
        (0, 40, True, "quick False, this run has True"),
    ):
        with pytest.raises(ValueError, match=word):
            offline_cost.measure_quality(output, seed, steps, quick=quick)
    for other, word in (
        (changed(whole, "machine", "instruction_sets"), "its quality has cpu"),
        (changed(whole, "versions", "torch"), "its quality has versions"),
        ({**whole, "threads": 99}, "its quality has threads 99"),
    ):
        output.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=word):
            offline_cost.measure_quality(output, 0, 40, quick=False)
    older = {name: value for name, value in whole.items() if name not in ("steps", "quick")}
    output.write_text(json.dumps(older))
    offline_cost.measure_quality(output, 0, 40, quick=False)
    assert PretendedQuality.asked == ["dense loop", "ours", "references"]


def test_a_result_of_another_kind_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = RESULTS / "offline-steps-zen4.json"
    output = tmp_path / "steps.json"
    output.write_bytes(steps.read_bytes())
    for kind, message in (
        (["--quality"], "is no result of --quality: give another file"),
        (["--pipeline"], "is no result with rows, it lacks rows: give another file"),
        ([], "is there, and a run adds nothing to it"),
    ):
        monkeypatch.setattr(sys, "argv", ["offline_cost", *kind, "--json", str(output)])
        with pytest.raises(SystemExit) as exit_:
            offline_cost.main()
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
        assert output.read_bytes() == steps.read_bytes()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--json OUT --checkpoints DIR", "--checkpoints are those of --pipeline"),
        ("--json OUT --quality --checkpoints DIR", "--checkpoints are those of --pipeline"),
        ("--json OUT --methods ria+cp", "--methods are those of --pipeline"),
        ("--json OUT --steps 40", "--steps and --seed are those of --quality"),
        ("--json OUT --pipeline --seed 0", "--steps and --seed are those of --quality"),
        ("--json OUT --quality --quick --steps 2", "leave out --steps"),
        ("--from OUT --plot SVG --quick", "--from measures nothing"),
        ("--from OUT --plot SVG --quality", "--from measures nothing"),
        ("--from OUT --plot SVG --seed 1", "--steps and --seed are those of --quality"),
        ("--from OUT", "--from only draws"),
    ],
)
def test_an_option_without_effect_is_refused(
    words: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offline_cost, "_measure", lambda *_: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["offline_cost", *words.split()])
    with pytest.raises(SystemExit) as exit_:
        offline_cost.main()
    assert exit_.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("offline-steps-zen4", ["channels", "4096", "the paper"]),
        ("offline-quality-zen4", ["perplexity", "ours: novels"]),
    ],
)
def test_figures_are_drawn_from_the_results(name: str, words: list[str], tmp_path: Path) -> None:
    draw(RESULTS / f"{name}.json", tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(word in text for word in words)
