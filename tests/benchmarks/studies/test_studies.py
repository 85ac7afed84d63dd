"""Every study runs on a tiny model, goes on where it was cut off, and draws what it measured."""

import datetime
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.records import rows
from benchmarks.records.rows import Rows
from benchmarks.studies import layers as layer_study
from benchmarks.studies import remembered as cache
from benchmarks.studies.__main__ import STUDIES, run
from benchmarks.studies.calibration import Calibrations
from benchmarks.studies.cells import Cells
from benchmarks.studies.layers import TRIES, choices, near, next_steps
from benchmarks.studies.quantization import Rounding, sorted_by_range
from benchmarks.studies.remembered import remembered
from benchmarks.studies.subject import LEARNING, QUICK, Subject
from permllm_offline.calibration.statistics import collect
from permllm_offline.recipe.schema import Recipe
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    directory = tmp_path_factory.mktemp("study")
    model = tiny_llama(intermediate_size=256, max_position_embeddings=64)
    model.save_pretrained(directory / "model")
    save_tokenizer(directory / "model")
    texts = {name: directory / f"{name}.txt" for name in ("calibration", "other", "near", "far")}
    for seed, path in enumerate(texts.values()):
        path.write_text(random_text(5000, seed), encoding="utf-8")
    evaluation = {"in domain": texts["near"], "novels": texts["far"]}
    sources = {"addresses": texts["calibration"], "manual": texts["other"]}
    return Subject("tiny", directory / "model", texts["calibration"], evaluation, QUICK, sources)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_measures_every_cell_once(name: str, subject: Subject, tmp_path: Path) -> None:
    output, plot = tmp_path / "study.json", tmp_path / "study.svg"
    facts = {"study": name, **subject.facts}
    run(name, subject, Rows(output, facts, STUDIES[name].key), plot)
    written = output.read_bytes()
    result = json.loads(written)
    assert result["study"] == name
    assert result["model"] == "tiny"
    assert {"date", "machine", "versions"} < set(result)
    assert plot.read_text(encoding="utf-8").startswith("<?xml")
    first = plot.read_bytes()
    run(name, subject, Rows(output, facts, STUDIES[name].key), plot)
    assert output.read_bytes() == written
    assert plot.read_bytes() == first


def test_norms_of_more_windows_are_those_of_one_pass(subject: Subject) -> None:
    calibrations = Calibrations(subject)
    few, _, many, _ = calibrations.counts
    calibrations.norms("addresses", few)
    windows = calibrations.windows("addresses", many)
    expected = collect(subject.load(), subject.family, windows, hidden_states=False).norms
    for found, norms in zip(calibrations.norms("addresses", many), expected, strict=True):
        torch.testing.assert_close(found, norms)


@pytest.mark.parametrize("across_blocks", [False, True])
def test_sorting_fours_changes_no_mask(across_blocks: bool, subject: Subject) -> None:
    rounding = Rounding(subject)
    for layout in rounding.plan.layers[0]:
        shape = (8, layout.in_features)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        weights = dict.fromkeys(layout.group.linears, weight)
        order = rounding.reallocated(0, layout, weights)
        found = sorted_by_range(rounding.reallocated, 4, across_blocks=across_blocks)(
            0, layout, weights
        )
        assert not torch.equal(found, order)
        fours = {frozenset(four) for four in order.reshape(-1, 4).tolist()}
        assert {frozenset(four) for four in found.reshape(-1, 4).tolist()} == fours
        blocks = found.reshape(layout.num_blocks, -1) // layout.block_size
        inside = bool((blocks == torch.arange(layout.num_blocks)[:, None]).all())
        assert inside or across_blocks
        if layout.group.name == "o" and not across_blocks:
            first, second = (found % layout.block_size).reshape(2, -1)
            assert torch.equal(first, second)


def test_every_choice_has_the_same_number_of_layers() -> None:
    found = choices(30)
    drawn = [found[f"random 6, draw {number}"] for number in (1, 2)]
    assert all(len(set(draw.split(","))) == 6 for draw in drawn)
    assert drawn[0] != drawn[1]
    assert {"all", "last:6", "auto:6", "spread:6"} < set(found)


def test_steps_that_may_cost_as_much() -> None:
    assert next_steps(83.0, 7.0, {15: 88.0}) is None  # near enough
    assert next_steps(83.0, 7.0, {15: 140.0}) == 9
    assert next_steps(83.0, 7.0, {15: 58.0}) == 22
    assert next_steps(10.0, 7.0, {15: 2000.0}) == 1
    assert next_steps(10.0, 5.0, {15: 5.0}) is None  # nothing to go by
    # A start of 45 seconds, which only a second run tells.
    assert next_steps(83.0, 7.0, {15: 123.0, 10: 97.0}) == 7
    # Steps that seemed to take nothing lead to twice as many, and from there back between.
    assert next_steps(83.0, 7.0, {15: 58.0, 22: 61.0}) == 44
    assert next_steps(83.0, 7.0, {15: 58.0, 22: 61.0, 44: 150.0}) == 27
    # One step more or less is too much.
    assert next_steps(83.0, 7.0, {3: 70.0, 4: 100.0}) is None
    assert next_steps(83.0, 7.0, {steps: 200.0 + steps for steps in range(10, 10 + TRIES)}) is None


@given(
    start=st.floats(0, 60),
    step=st.floats(2, 6),
    budget=st.floats(70, 200),
    noise=st.lists(st.floats(0.99, 1.01), min_size=TRIES, max_size=TRIES),
)
def test_tries_end_near_to_the_budget(
    start: float, step: float, budget: float, noise: list[float]
) -> None:
    """Where one step is small against the budget, whatever comes before the first."""
    runs = {15: (start + 15 * step) * noise[0]}
    while steps := next_steps(budget, 5.0, runs):
        assert steps not in runs
        runs[steps] = (start + steps * step) * noise[len(runs)]
    assert len(runs) <= TRIES
    assert any(near(budget, seconds) for seconds in runs.values())


def test_rows_of_equal_cost_say_so(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds are pretended: sensitivities take 40 of them, each step 1 for a layer that learns."""

    def pruned(recipe: Recipe) -> dict[str, Any]:
        found: dict[str, Any] = {"perplexity": {"in domain": 30.0}}
        if recipe.method != "permllm-wanda":
            return {**found, "seconds": 5.0}
        layers = str(recipe.learning.layers)
        step = 3.0 if layers == "all" else 1.0
        seconds = 5.0 + 40.0 * ("auto" in layers) + step * recipe.learning.steps
        return {**found, "seconds": seconds}

    pretended = SimpleNamespace(
        sizes=replace(LEARNING, steps=60),
        layers=30,
        dense=lambda: {"perplexity": {"in domain": 20.0}},
        recipe=lambda method, learning=None: subject.recipe(method, learning=learning or {}),
        pruned=pruned,
    )
    cells = Cells(Rows(tmp_path / "study.json", {}, layer_study.STUDY.key))
    layer_study.measure(pretended, cells)  # type: ignore[arg-type]
    equal = {(row["layers"], row.get("steps")) for row in cells.rows if row.get("cost") == "equal"}
    assert equal == {
        ("spread:6", None),
        ("last:6", None),
        ("random 6, draw 1", None),
        ("random 6, draw 2", None),
        ("all", 20),
        ("auto:6", 20),
    }
    assert all(58.5 <= row["seconds"] <= 71.5 for row in cells.rows if "cost" in row)


def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    path, key = tmp_path / "result.json", ("method", "size")
    measured = []

    def measure(value: int) -> dict[str, int]:
        measured.append(value)
        return {"value": value}

    first = Cells(Rows(path, {}, key))
    row = first.row({"method": "a"}, lambda: measure(1))
    assert (row["method"], row["value"]) == ("a", 1)
    assert first.row({"method": "a", "size": 2}, lambda: measure(2))["value"] == 2
    again = Cells(Rows(path, {}, key))
    assert again.row({"method": "a"}, lambda: measure(3))["value"] == 1
    assert again.row({"method": "a", "size": 2}, lambda: measure(4))["value"] == 2
    assert again.row({"method": "b"}, lambda: measure(5))["value"] == 5
    assert measured == [1, 2, 5]


def test_an_unfinished_cell_leaves_the_finished_ones(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    cells = Cells(Rows(path, {}, ["method"]))
    cells.row({"method": "a"}, lambda: {"value": 1})
    with pytest.raises(KeyboardInterrupt):
        cells.row({"method": "b"}, _interrupted)
    assert [row["method"] for row in Cells(Rows(path, {}, ["method"])).rows] == ["a"]


def test_a_measurement_is_remembered_for_its_key(tmp_path: Path) -> None:
    first = remembered({"method": "a"}, lambda: {"value": 1})
    assert first["value"] == 1
    assert remembered({"method": "a"}, _interrupted) == first
    assert remembered({"method": "b"}, lambda: {"value": 2})["value"] == 2


def test_a_measurement_of_other_sources_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[Any] = []

    def others(packages: Any) -> str:
        digested.extend(packages)
        return "others"

    assert remembered({"method": "c"}, lambda: {"value": 1})["value"] == 1
    monkeypatch.setattr("benchmarks.studies.remembered.sources_digest", others)
    assert remembered({"method": "c"}, lambda: {"value": 2})["value"] == 2
    assert remembered({"method": "c"}, _interrupted)["value"] == 2
    assert Path(layer_study.__file__).parent in digested


def test_a_remembered_row_has_the_date_and_the_commit_of_its_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dated(day: int, commit: str) -> None:
        calendar = SimpleNamespace(today=lambda: datetime.date(2030, 1, day))
        for module in (rows, cache):
            monkeypatch.setattr(module, "datetime", SimpleNamespace(date=calendar))
            monkeypatch.setattr(module, "revision", lambda: commit)

    dated(1, "one")
    remembered({"method": "d"}, lambda: {"value": 1})
    dated(2, "two")
    cells = Cells(Rows(tmp_path / "result.json", {}, ["method"]))
    old = cells.row({"method": "d"}, lambda: remembered({"method": "d"}, _interrupted))
    assert old == {"method": "d", "value": 1, "date": "2030-01-01", "commit": "one"}
    assert json.loads((tmp_path / "result.json").read_text())["date"] == "2030-01-01"
    new = cells.row({"method": "e"}, lambda: {"value": 2})
    assert (new["date"], new["commit"]) == ("2030-01-02", "two")


def test_a_measurement_on_another_text_is_not_remembered(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(random_text(5000, 1), encoding="utf-8")
    evaluated = {"in domain": text}
    own = Subject("tiny", subject.directory, text, evaluated, QUICK, {})
    monkeypatch.setattr(own, "load", lambda: None)
    monkeypatch.setattr(own, "perplexity", lambda _: {"in domain": 1.0})
    assert own.dense()["perplexity"] == {"in domain": 1.0}
    monkeypatch.setattr(own, "perplexity", lambda _: {"in domain": 2.0})
    assert own.dense()["perplexity"] == {"in domain": 1.0}
    text.write_text(random_text(5000, 2), encoding="utf-8")
    assert own.dense()["perplexity"] == {"in domain": 2.0}


def _interrupted() -> dict[str, int]:
    raise KeyboardInterrupt
