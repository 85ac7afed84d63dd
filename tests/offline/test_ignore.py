"""Linears that stay dense by choice: whole checkpoints, against the dense model and its masks."""

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import permllm_offline
import permllm_vllm.hf  # noqa: F401  (registers the format)
from permllm_offline import pipeline
from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.pipeline import rehearse
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning import streamed
from permllm_offline.pruning.in_memory import prune_model
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.recipe_lines import Words, with_recipe
from tests.offline.tiny_models import save_tokenizer, tiny_model

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LINEARS = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
EVERY = {f"model.layers.{index}.{linear}" for index in (0, 1) for linear in LINEARS}
FILES = ("model.safetensors", "config.json", "recipe.yaml", "report.json")
SIZES = ("--num-samples", "10", "--sequence-length", "16")

# What is ignored; a part of the names of what that is; and what is permuted at run time beside
# q, k, v, gate and up, because the rows before it are those of a dense layer.
CASES: dict[str, tuple[list[str], Callable[[str], bool], set[str]]] = {
    "a whole decoder layer": ([r"re:model\.layers\.0\..*"], lambda n: ".layers.0." in n, set()),
    "every down": ([r"re:.*\.down_proj"], lambda n: "down" in n, set()),
    "gate and up": (
        [r"re:.*\.(gate|up)_proj"],
        lambda n: "gate" in n or "up_proj" in n,
        {"mlp.down_proj"},
    ),
    "q, k and v, by name": (
        [f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ATTENTION[:3]],
        lambda n: n.endswith(ATTENTION[:3]),
        {"self_attn.o_proj"},
    ),
}
SHORT = {
    "evaluation_windows": 3,
    "learning": {"steps": 4, "validation_interval": 2, "validation_windows": 2},
    "blockwise": {"steps": 4, "validation_interval": 2, "validation_windows": 2},
    "distillation": {"steps": 2, "self_windows": 3, "validation_windows": 2},
}
WINDOW = {"learning": {"scope": "window", "window": 1, "learning_rate": 0.3}}
METHODS: dict[str, tuple[Words, ...]] = {
    "masks": ("--method", "magnitude"),
    "permuted": ("--method", "wanda+cp", "--values", "int8", {"smoothing": False}),
    "learned": ("--method", "permllm-wanda", {"learning": {"learning_rate": 0.3}}),
    "most sensitive": ("--method", "permllm-ria", {"learning": {"layers": "auto:1"}}),
    "in windows": ("--method", "permllm-wanda", WINDOW, "--reconstruction", "obs"),
    "tuned": ("--method", "wanda+cp", "--reconstruction", "obs+blockwise"),
    "own masks": ("--method", "sparsegpt", "--pattern", "4:8"),
    "distilled": ("--method", "permllm-best"),
    "smoothed": ("--method", "wanda+cp", "--values", "int8"),
}


def every_second(methods: Iterable[str], *, first: int) -> list[tuple[str, str]]:
    """Methods and cases by turns: each method with two cases, each case with half the methods."""
    return [
        (method, case)
        for row, method in enumerate(methods)
        for column, case in enumerate(CASES)
        if (row + column) % 2 == first
    ]


@pytest.fixture
def prune(
    tiny_model_directory: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., int]:
    recipe = tmp_path_factory.mktemp("recipes") / "short.yaml"

    def prune(output: Path, *options: Words) -> int:
        output.parent.mkdir(exist_ok=True)
        data = ("--dataset", str(text_file), *SIZES, *with_recipe(recipe, SHORT, *options))
        return main(["prune", str(tiny_model_directory), "--output", str(output), *data])

    return prune


def logits(model: Any) -> Tensor:
    tokens = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


def entries_of(model: Path, text: Path, **options: Any) -> dict[str, Any]:
    data = {"dataset": str(text), "num_samples": 10, "sequence_length": 20}
    return {"model": str(model), "method": "wanda", "evaluation_windows": 0} | data | options


def quantization(output: Path) -> dict[str, Any]:
    return json.loads((output / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("method", "case"), every_second(METHODS, first=0))
def test_the_checkpoint_is_the_masked_model(
    method: str,
    case: str,
    tmp_path: Path,
    prune: Callable[..., int],
    tiny_model_directory: Path,
    text_file: Path,
) -> None:
    entries, dense_by_choice, at_run_time = CASES[case]
    output, options = tmp_path / "sparse", METHODS[method]
    assert prune(output, *options, "--ignore", *entries) == 0

    # What is sparse, and what config.json says of the rest: the user's own words.
    assert validate(output) == []
    reader, source = CheckpointReader(output), CheckpointReader(tiny_model_directory)
    ignored = {name for name in EVERY if dense_by_choice(name)}
    assert set(reader.sparse_layers()) == EVERY - ignored
    found = quantization(output)
    assert found["ignore"] == ["lm_head", *entries]
    if found["folded"] or found["runtime_permuted"]:
        inputs = {f"self_attn.{name}" for name in ATTENTION[:3]}
        inputs |= {"mlp.gate_proj", "mlp.up_proj"} | at_run_time
        expected = {name for name in EVERY - ignored if name.split(".", 3)[3] in inputs}
        assert set(found["runtime_permuted"]) == expected
        assert set(found["folded"]) == EVERY - ignored - expected

    # Every tensor that stays dense is the one of the source, but for norms that are divided.
    smoothed = found.get("smoothed", False)
    for name in source.names():
        if smoothed and "layernorm" in name:
            continue
        if name.rpartition(".")[0] not in EVERY - ignored:
            assert torch.equal(reader.tensor(name), source.tensor(name)), name

    # In Transformers, and as a plain checkpoint, it is the model that was pruned in memory.
    recipe = make_recipe(
        yaml.safe_load((output / "recipe.yaml").read_text())
        | {"model": str(tiny_model_directory), "dataset": str(text_file)}
    )
    twin = prune_model(recipe, prepare(recipe)).model
    served = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    expected_logits = logits(twin)
    difference = (logits(served) - expected_logits).abs().max()
    assert difference < 1e-4 * expected_logits.abs().max()
    assert main(["convert", str(output), "--to", "dense", "--output", str(tmp_path / "d")]) == 0
    plain = load_file(tmp_path / "d" / "model.safetensors")
    for name, tensor in twin.state_dict().items():
        assert smoothed or torch.equal(plain[name], tensor), name
    assert main(["inspect", str(output), "--verify"]) == 0


@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_without_ignored_ones(
    case: str, tmp_path: Path, prune: Callable[..., int], tiny_model_directory: Path
) -> None:
    entries, dense_by_choice, _ = CASES[case]
    assert prune(tmp_path / "sparse", "--method", "magnitude", "--ignore", *entries) == 0
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_directory, dtype=torch.float32)
    for name in EVERY:
        if not dense_by_choice(name):
            weight = expected.get_submodule(name).weight.data
            groups = weight.unflatten(1, (-1, 4))
            least = groups.abs().topk(2, dim=-1, largest=False).indices
            groups.scatter_(-1, least, 0.0)
    dense = logits(AutoModelForCausalLM.from_pretrained(tiny_model_directory, dtype=torch.float32))
    wanted = logits(expected)
    assert (logits(served) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (dense - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize(
    ("method", "case"),
    every_second(["masks", "permuted", "in windows", "tuned", "own masks"], first=1),
)
def test_one_layer_at_a_time_gives_the_same(
    method: str,
    case: str,
    tmp_path: Path,
    prune: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = (*METHODS[method], "--ignore", *CASES[case][0])
    assert prune(tmp_path / "streamed" / "sparse", *options) == 0
    monkeypatch.setattr(pipeline, "can_stream", lambda recipe: False)
    assert prune(tmp_path / "whole" / "sparse", *options) == 0
    for file in FILES:
        streamed, whole = (tmp_path / way / "sparse" / file for way in ("streamed", "whole"))
        assert streamed.read_bytes() == whole.read_bytes(), file


class CutOff(BaseException):
    """In place of a signal."""


CUT_AT: dict[str, tuple[object, str]] = {
    "in windows": (streamed, "finish_layer"),
    "tuned": (streamed, "finish_layer"),
    "learned": (pipeline, "_tensors"),
    "distilled": (pipeline, "write_checkpoint"),
}


@pytest.mark.parametrize("method", CUT_AT)
def test_a_run_that_was_cut_off_goes_on(
    method: str, tmp_path: Path, prune: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*METHODS[method], "--ignore", *CASES["a whole decoder layer"][0])
    assert prune(tmp_path / "whole" / "sparse", *options) == 0
    place, name = CUT_AT[method]
    original = getattr(place, name)
    passed = []

    def cut(*arguments: Any, **more: Any) -> Any:
        if name != "finish_layer" or len(passed) == 1:  # behind the layer that is left dense
            raise CutOff
        passed.append(original(*arguments, **more))
        return passed[0]

    with monkeypatch.context() as patch:
        patch.setattr(place, name, cut)
        with pytest.raises(CutOff):
            prune(tmp_path / "again" / "sparse", *options)
    assert prune(tmp_path / "again" / "sparse", *options) == 0
    for file in FILES:
        whole, again = (tmp_path / way / "sparse" / file for way in ("whole", "again"))
        assert whole.read_bytes() == again.read_bytes(), file


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "opt"])
def test_other_families(model_type: str, tmp_path: Path, text_file: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    before = {  # the linear whose rows would take the permutation of o's input
        "phi3": r"re:.*\.qkv_proj",
        "gpt_neox": r"re:.*\.query_key_value",
        "opt": r"re:.*\.[qkv]_proj",
    }[model_type]
    options = {"method": "wanda+cp", "ignore": [before]}
    recipe = make_recipe(entries_of(tmp_path / "model", text_file, **options))
    pipeline.prune(recipe, tmp_path / "sparse")
    assert validate(tmp_path / "sparse") == []
    assert any("o" in name for name in quantization(tmp_path / "sparse")["runtime_permuted"])
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    expected = logits(prune_model(recipe, prepare(recipe)).model)
    assert (logits(served) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_what_was_left_dense_is_told_everywhere(
    tmp_path: Path,
    prune: Callable[..., int],
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, entries = tmp_path / "sparse", CASES["gate and up"][0]
    options = ("--method", "wanda+cp", "--ignore", *entries)
    assert prune(output, *options) == 0
    assert "linear layers left dense" in capsys.readouterr().out
    names = [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj")]
    assert json.loads((output / "report.json").read_text())["left_dense"] == names
    assert yaml.safe_load((output / "recipe.yaml").read_text())["ignore"] == entries
    page = (output / "report.html").read_text()
    assert f"4 linear layers: {entries[0]}" in page
    assert all(name in page for name in names)
    card = (output / "README.md").read_text()
    escaped = entries[0].replace("|", r"\|")
    assert f"| left dense by choice | 4 linear layers: `{escaped}` |" in card

    assert main(["inspect", str(output), "--json", str(tmp_path / "i.json")]) == 0
    assert f"left dense: lm_head, {entries[0]}" in capsys.readouterr().out
    assert json.loads((tmp_path / "i.json").read_text())["ignore"] == ["lm_head", *entries]

    plan = ["plan", str(tiny_model_directory), *options, "--json", str(tmp_path / "p.json")]
    assert main(plan) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "--ignore" in line]
    assert ["gate_proj" in rows[0], "up_proj" in rows[1], len(rows)] == [True, True, 2]
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["left_dense"] == names
    assert {linear["name"] for linear in found["linears"]} == EVERY - set(names)
    assert {one["permutation"] for one in found["linears"] if "down" in one["name"]} == {"run time"}
    assert set(names) <= {name.removesuffix(".weight") for name in found["dense"]}

    assert prune(tmp_path / "no", *options, "--dry-run") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "_proj" in line]
    assert len(rows) == 14
    for row in rows:
        assert ("left dense" in row) == ("gate_proj" in row or "up_proj" in row)


def test_a_checkpoint_of_which_little_is_left(
    tmp_path: Path, prune: Callable[..., int], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sparse"
    every_but_one = [r"re:model\.layers\.1\..*", r"re:.*0\.self_attn\..*", r"re:.*\.(gate|up)_proj"]
    assert prune(output, *METHODS["learned"], "--ignore", *every_but_one) == 0
    assert CheckpointReader(output).sparse_layers() == ["model.layers.0.mlp.down_proj"]
    capsys.readouterr()
    options = ("--dataset", str(text_file), "--sequence-length", "16", "--max-windows", "3")
    assert main(["eval", str(output), *options]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["learned_layers"] == [0]
    assert len(report["output_errors"]) == 2


def test_from_python_and_from_a_recipe_file(
    tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = r"re:.*\.down_proj"
    report = permllm_offline.prune(
        tiny_model_directory, tmp_path / "sparse", method="magnitude", ignore=[entry]
    )
    assert report.left_dense == [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]
    again = ["--recipe", str(tmp_path / "sparse" / "recipe.yaml"), "--output", str(tmp_path / "a")]
    assert main(["prune", str(tiny_model_directory), *again]) == 0
    assert quantization(tmp_path / "a")["ignore"] == ["lm_head", entry]
    # The command's own take the place of the file's.
    other = ["--ignore", r"re:.*\.o_proj", "--output", str(tmp_path / "b")]
    assert main(["prune", str(tiny_model_directory), *again[:2], *other]) == 0
    assert quantization(tmp_path / "b")["ignore"] == ["lm_head", r"re:.*\.o_proj"]
    with pytest.raises(OfflineError, match=r"--ignore 're:a' cannot be used: it should be a list"):
        permllm_offline.prune(tiny_model_directory, tmp_path / "c", ignore="re:a")  # type: ignore[arg-type]
    capsys.readouterr()
    for command in (["plan", str(tiny_model_directory)], ["prune", str(tiny_model_directory)]):
        output = ["--output", str(tmp_path / "c")] if command[0] == "prune" else []
        assert main([*command, *output, "--method", "magnitude", "--ignore", "down_proj"]) == 2
        assert f"Did you mean {shlex.quote(entry)}?" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("layers", ["all", "last:1", "spread:1", "0-1"])
def test_layers_that_are_left_dense_do_not_learn(
    layers: str, tmp_path: Path, prune: Callable[..., int]
) -> None:
    options = ("--method", "permllm-wanda", "--ignore", *CASES["a whole decoder layer"][0])
    assert prune(tmp_path / "sparse", *options, {"learning": {"layers": layers}}) == 0
    report = json.loads((tmp_path / "sparse" / "report.json").read_text())
    assert report["learned_layers"] == [1]


@pytest.mark.parametrize(
    ("layers", "message"),
    [("0", "nothing of 0 is pruned"), ("auto:2", "1 decoder layers that are not left dense")],
)
def test_to_learn_a_layer_that_is_left_dense_is_refused(
    layers: str,
    message: str,
    tmp_path: Path,
    prune: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--method", "permllm-wanda", "--ignore", *CASES["a whole decoder layer"][0])
    assert prune(tmp_path / "sparse", *options, {"learning": {"layers": layers}}) == 2
    assert message in capsys.readouterr().err


def test_bytes_are_those_that_are_written(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    for number, (entries, _, _) in enumerate(CASES.values()):
        options = {"ignore": entries, "method": "wanda+cp"}
        recipe = make_recipe(entries_of(tiny_model_directory, text_file, **options))
        output = tmp_path / str(number)
        _, prepared = rehearse(recipe, output)
        pipeline.prune(recipe, output)
        written = load_file(output / "model.safetensors").values()
        assert prepared.plan.total_bytes == sum(tensor.nbytes for tensor in written)
