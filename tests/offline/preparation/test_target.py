"""Which pattern a prune gets: --pattern, then --target, then the recipe, then this machine."""

import json
from pathlib import Path

import pytest
import yaml

from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.preparation.target import recipe_for
from permllm_offline.recipe.schema import Recipe
from permllm_vllm.diagnosis import target as targets

EXPECTED = {"amx": "32:64", "cpu": "8:16", "gpu": "2:4"}


@pytest.fixture(params=EXPECTED)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This machine is one of them."""
    monkeypatch.setattr(targets, "detected", lambda: request.param)
    return request.param


def made(target: str | None, recorded: dict[str, object] | None = None, **entries: str) -> Recipe:
    return recipe_for(target, {"model": "m", **entries}, recorded=recorded)


def test_every_target_is_known() -> None:
    assert dict(targets.TARGETS) == EXPECTED
    for name, pattern in EXPECTED.items():
        assert made(name).pattern == pattern
    with pytest.raises(OfflineError, match=r"target 'tpu' is not known: .*auto, amx, cpu, gpu"):
        made("tpu")


def test_without_a_word_this_machine_decides(here: str) -> None:
    assert made(None).pattern == made("auto").pattern == EXPECTED[here]


def test_the_order_of_what_decides(here: str) -> None:
    recorded = {"pattern": "4:8"}
    assert made(None, recorded).pattern == "4:8"
    assert made("amx", recorded).pattern == "32:64"
    assert made("auto", recorded).pattern == EXPECTED[here]
    assert made("amx", recorded, pattern="2:4").pattern == "2:4"
    assert recipe_for(None, {"model": "m"}, preset_name="paper").pattern == "2:4"


@pytest.mark.parametrize(("target", "pattern"), [("amx", "8:16"), ("cpu", "8:16"), ("gpu", "2:4")])
def test_a_learned_permutation_gets_room(target: str, pattern: str) -> None:
    assert made(target, method="permllm-wanda").pattern == pattern
    with pytest.raises(OfflineError, match=r"32:64 one group fills a block of 64.*--pattern 2:4"):
        made(target, method="permllm-wanda", pattern="32:64")


def test_the_checkpoint_records_the_pattern(
    here: str, tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sparse"
    arguments = ["--method", "magnitude", "--output", str(output)]
    assert main(["prune", str(tiny_model_directory), *arguments]) == 0
    assert yaml.safe_load((output / "recipe.yaml").read_text())["pattern"] == EXPECTED[here]
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["pattern"] == EXPECTED[here]
    plan = tmp_path / "plan.json"
    assert main(["plan", str(tiny_model_directory), "--json", str(plan)]) == 0
    assert json.loads(plan.read_text())["pattern"] == EXPECTED[here]
    options = ["--target", "cpu", "--json", str(plan)]
    assert main(["plan", str(tiny_model_directory), *options]) == 0
    assert json.loads(plan.read_text())["pattern"] == "8:16"
    capsys.readouterr()
    assert main(["prune", str(tiny_model_directory), *arguments, "--target", "tpu"]) == 2
    assert "give one of auto, amx, cpu, gpu" in capsys.readouterr().err


def test_a_recipe_keeps_its_pattern_on_another_machine(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = []
    more: tuple[str, ...] = ()
    for machine in EXPECTED:
        monkeypatch.setattr(targets, "detected", lambda machine=machine: machine)
        output = tmp_path / machine
        arguments = ["--method", "magnitude", "--output", str(output), *more]
        assert main(["prune", str(tiny_model_directory), *arguments]) == 0
        patterns.append(yaml.safe_load((output / "recipe.yaml").read_text())["pattern"])
        more = ("--recipe", str(output / "recipe.yaml"))
    assert patterns == ["32:64"] * 3
