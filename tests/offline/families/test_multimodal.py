"""Models of text and images: their language model is pruned, the rest stays as it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from permllm_offline import pipeline
from permllm_offline.cli import main
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_offline.forecast.outline import outline
from permllm_offline.model.loading import load_model, load_served, open_source
from permllm_offline.model.stored import read_stored
from permllm_offline.preparation.prepared import prepare
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.recipe.schema import Recipe
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.tiny_models import tiny_model
from tests.offline.tiny_multimodal import CONFIGURATIONS, WORDS, byte_tokenizer, tiny_multimodal

CPU = torch.device("cpu")
TOLERANCE = 1e-5
TOWERS = {
    "qwen3_5": [r"re:model\.visual\..*"],
    "qwen3_vl": [r"re:model\.visual\..*"],
    "qwen2_5_vl": [r"re:visual\..*"],
    "smolvlm": [r"re:model\.connector\..*", r"re:model\.vision_model\..*"],
}
OTHERS = [r"re:multi_modal_projector\..*", r"re:vision_tower\..*"]


def tokens() -> torch.Tensor:
    return torch.randint(32, 126, (2, 24), generator=torch.Generator().manual_seed(1))


def recipe(model: Path, text: Path, **other: object) -> Recipe:
    sizes = {"num_samples": 8, "sequence_length": 32, "evaluation_windows": 2}
    said = {"method": "wanda+cp", "dataset": [str(text)], **sizes, **other}
    return Recipe(model=str(model), **said)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Alice was beginning to get very tired of sitting by her sister. " * 40)
    return file


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens()).logits
    return found


@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_pruned_as_a_whole(tmp_path: Path, text: Path, model_type: str) -> None:
    """By the whole model of Transformers, which knows nothing of this project."""
    source = tiny_multimodal(model_type, tmp_path / "model")
    report = pipeline.prune(recipe(source, text), tmp_path / "sparse")
    assert validate(tmp_path / "sparse") == []
    assert {layer.permutation for layer in report.layers} == {"run time", "folded"}
    sparse, before = open_source(str(tmp_path / "sparse")), open_source(str(source))
    reader = CheckpointReader(tmp_path / "sparse")
    assert reader.quantization is not None
    assert list(reader.quantization.ignore[-2:])[-len(TOWERS.get(model_type, OTHERS)) :] == (
        TOWERS.get(model_type, OTHERS)
    )
    stored = load_file(source / "model.safetensors")
    beside = [name for name in stored if before.language.names.own(name) is None]
    assert beside
    assert all(torch.equal(reader.tensor(name), stored[name]) for name in beside)

    convert_to_dense(str(tmp_path / "sparse"), tmp_path / "dense")
    whole, unpruned = (
        AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tmp_path / "dense", source)
    )
    expected = logits(whole)
    scale = expected.abs().max()
    assert (logits(unpruned) - expected).abs().max() / scale > 1e-2
    for model in (load_model(sparse, torch.float32, CPU), load_served(sparse, torch.float32, CPU)):
        assert (logits(model) - expected).abs().max() / scale < TOLERANCE


def test_norms_that_are_divided_go_by_the_names_of_the_checkpoint(
    tmp_path: Path, text: Path
) -> None:
    source = tiny_multimodal("llava", tmp_path / "model")
    stored = load_file(source / "model.safetensors")
    for name, tensor in stored.items():
        if "layernorm" in name and "language" in name:
            stored[name] = torch.linspace(0.01, 3, tensor.numel())
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    asked = recipe(source, text, values="int8", dtype="float32")
    pipeline.prune(asked, tmp_path / "sparse")
    reader = CheckpointReader(tmp_path / "sparse")
    assert reader.quantization is not None
    assert reader.quantization.smoothed
    pruned = prune_model(asked, prepare(asked)).model
    baked = load_model(open_source(str(tmp_path / "sparse")), torch.float32, CPU)
    expected = logits(pruned)
    assert (logits(baked) - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma3"])
def test_converted_back_and_again(tmp_path: Path, text: Path, model_type: str) -> None:
    source = tiny_multimodal(model_type, tmp_path / "model")
    pipeline.prune(recipe(source, text, method="wanda"), tmp_path / "sparse")
    convert_to_dense(str(tmp_path / "sparse"), tmp_path / "dense")
    convert_to_sparse(str(tmp_path / "dense"), tmp_path / "again", strict=True)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    ignored = [
        CheckpointReader(tmp_path / name).config["quantization_config"]["ignore"]
        for name in ("sparse", "again")
    ]
    assert ignored[0] == ignored[1]


def test_a_tied_head_has_no_tensor(tmp_path: Path, text: Path) -> None:
    source = tiny_multimodal("gemma3", tmp_path / "model", tied=True)
    assert open_source(str(source)).config.tie_word_embeddings
    pipeline.prune(recipe(source, text), tmp_path / "sparse")
    convert_to_dense(str(tmp_path / "sparse"), tmp_path / "dense")
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    expected = logits(whole.eval())
    found = logits(load_model(open_source(str(tmp_path / "sparse")), torch.float32, CPU))
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("method", ["permllm-best", "permllm-wanda"])
def test_learned_and_distilled(tmp_path: Path, text: Path, method: str) -> None:
    """These hold the whole language model, and layer by layer is another path."""
    source = tiny_multimodal("mistral3", tmp_path / "model")
    few = {"steps": 2, "self_windows": 0} if method == "permllm-best" else {"steps": 2}
    part = "distillation" if method == "permllm-best" else "learning"
    pipeline.prune(recipe(source, text, method=method, **{part: few}), tmp_path / "sparse")
    assert validate(tmp_path / "sparse") == []
    convert_to_dense(str(tmp_path / "sparse"), tmp_path / "dense")
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    expected = logits(whole.eval())
    found = logits(load_model(open_source(str(tmp_path / "sparse")), torch.float32, CPU))
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_another_dtype_is_that_of_the_towers_too(tmp_path: Path, text: Path) -> None:
    source = tiny_multimodal("llava", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["dtype"] = "bfloat16"
    (source / "config.json").write_text(json.dumps(config))
    asked = recipe(source, text, method="magnitude", dataset=[], dtype="float16")
    pipeline.prune(asked, tmp_path / "sparse")
    written = load_file(tmp_path / "sparse" / "model.safetensors")
    floating = {tensor.dtype for tensor in written.values() if tensor.is_floating_point()}
    assert floating == {torch.float16}
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float16"
    assert config["text_config"]["hidden_size"] == 128
    prepared = prepare(asked)
    assert prepared.output_bytes == sum(tensor.nbytes for tensor in written.values())


def test_names_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    source = tiny_multimodal("gemma3", tmp_path / "model")
    ignore = [r"re:.*\.layers\.1\..*", "language_model.model.layers.0.mlp.down_proj"]
    found = outline(
        read_stored(str(source)), Pattern(2, 4), 64, "bfloat16", permuted=True, ignore=ignore
    )
    assert {linear.name.rpartition(".")[0] for linear in found.linears} == {
        "language_model.model.layers.0.mlp",
        "language_model.model.layers.0.self_attn",
    }
    assert len(found.linears) == 6
    assert found.bytes_before == (source / "model.safetensors").stat().st_size - _header(source)
    assert list(found.beside) == ["multi_modal_projector", "vision_tower"]


def _header(source: Path) -> int:
    first = (source / "model.safetensors").read_bytes()[:8]
    return 8 + int.from_bytes(first, "little")


def test_the_plan_has_a_line_for_a_tower(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tiny_multimodal("gemma3", tmp_path / "model")
    assert main(["plan", str(source)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("vision_tower" in line for line in lines) == 1


def test_a_language_model_of_no_family(tmp_path: Path) -> None:
    source = tiny_multimodal("llava", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["text_config"] = {"model_type": "bloom"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(OfflineError, match="model_type 'llava' is not supported"):
        prepare(Recipe(model=str(source), method="magnitude"))


def test_a_language_model_by_other_names(tmp_path: Path) -> None:
    source = tiny_multimodal("llava", tmp_path / "model")
    weights = source / "model.safetensors"
    renamed = {
        name.replace("language_model", "speaker"): t for name, t in load_file(weights).items()
    }
    save_file(renamed, weights)
    with pytest.raises(OfflineError, match=r"Its language model.*llama.*has it under none of"):
        prepare(Recipe(model=str(source), method="magnitude"))


def test_what_predicts_more_tokens_stays(tmp_path: Path, text: Path) -> None:
    """Of language models too, whose checkpoints have it and whose models have not."""
    source = tmp_path / "model"
    model = tiny_model("qwen3_5_text", vocab_size=WORDS)
    model.to(torch.bfloat16).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    file = source / "model.safetensors"
    more = {"mtp.fc.weight": torch.randn(128, 256), "mtp.layers.0.norm.weight": torch.ones(128)}
    more = {name: tensor.bfloat16() for name, tensor in more.items()}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    pipeline.prune(recipe(source, text), tmp_path / "sparse")
    assert validate(tmp_path / "sparse") == []
    reader = CheckpointReader(tmp_path / "sparse")
    assert reader.quantization is not None
    for name, tensor in more.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.quantization.is_ignored(name.removesuffix(".weight"))
    prepared, written = prepare(recipe(source, text)), load_file(tmp_path / "sparse" / file.name)
    assert prepared.output_bytes == sum(tensor.nbytes for tensor in written.values())
    sparse = open_source(str(tmp_path / "sparse"))
    torch.testing.assert_close(
        logits(load_model(sparse, torch.float32, CPU)),
        logits(load_served(sparse, torch.float32, CPU)),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_head_that_is_lost_is_not_a_tied_one(tmp_path: Path, text: Path) -> None:
    source = tiny_multimodal("llava", tmp_path / "model")
    weights = source / "model.safetensors"
    stored = load_file(weights)
    del stored["language_model.lm_head.weight"]
    save_file(stored, weights, metadata={"format": "pt"})
    assert not open_source(str(source)).config.tie_word_embeddings
    with pytest.raises(OfflineError, match=r"does not hold the tensors .*lm_head\.weight"):
        pipeline.prune(recipe(source, text), tmp_path / "sparse")


def test_the_outer_dtype_is_that_of_the_model(tmp_path: Path) -> None:
    """Published checkpoints may say another one inside."""
    source = tiny_multimodal("llava", tmp_path / "model")
    weights = source / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"], config["text_config"]["dtype"] = "float16", "bfloat16"
    (source / "config.json").write_text(json.dumps(config))
    pipeline.prune(Recipe(model=str(source), method="magnitude"), tmp_path / "sparse")
    written = load_file(tmp_path / "sparse" / "model.safetensors")
    same = [name for name in half if name in written]
    assert all(torch.equal(written[name], half[name]) for name in same)
    assert any("vision_tower" in name for name in same)


def test_what_stays_dense_keeps_its_dtype(tmp_path: Path) -> None:
    source = tiny_multimodal("qwen3_5", tmp_path / "model")
    weights = source / "model.safetensors"
    stored = load_file(weights)
    wide = [name for name in stored if name.endswith(("A_log", "patch_embed.proj.weight"))]
    assert len(wide) == 2
    stored |= {name: torch.randn(stored[name].shape) for name in wide}
    save_file(stored, weights, metadata={"format": "pt"})
    pipeline.prune(Recipe(model=str(source), method="magnitude"), tmp_path / "sparse")
    written = load_file(tmp_path / "sparse" / "model.safetensors")
    assert all(torch.equal(written[name], stored[name]) for name in wide)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl"])
def test_a_language_model_of_another_name_is_one_of_a_family(
    tmp_path: Path, model_type: str
) -> None:
    source = tiny_multimodal(model_type, tmp_path / "model")
    weights = source / "model.safetensors"
    renamed = {f"speaker.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(renamed, weights)
    with pytest.raises(OfflineError, match=rf"model_type '{model_type}_text', is, but"):
        prepare(Recipe(model=str(source), method="magnitude"))
