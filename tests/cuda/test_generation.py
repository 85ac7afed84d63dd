"""The decoder that measures generation on a GPU, on the CPU against transformers."""

import dataclasses
import json
import sys
import weakref

import pytest
import torch

from benchmarks.cuda import generation, memory, pruned
from benchmarks.cuda.generation import TOLERANCE, Outcome, compare, require_equal
from benchmarks.cuda.llama import Llama, RandomWeights, Shape, load
from benchmarks.cuda.pruned import MERGED, both, is_sparse, merge, prune_layers, read
from permllm_vllm.backends import select_backend
from permllm_vllm.backends.cuda import CudaBackend

SMALL = Shape(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=64,
)
CPU = torch.device("cpu")


def read_prompt(shape, weights, linears, prompt):
    model = Llama(shape, weights, linears, len(prompt), 16)
    logits = []
    for token in prompt.t():
        model.token.copy_(token)
        model.step()
        logits.append(model.logits.clone())
    return torch.stack(logits, dim=1)


def test_says_what_transformers_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps",
    )  # fmt: skip
    config = transformers.LlamaConfig(**{name: getattr(SMALL, name) for name in names})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    shape, weights = load(tmp_path, torch.float32, CPU)
    assert shape == SMALL
    layers = list(prune_layers(shape, weights))
    prompt = torch.randint(64, (3, 9))
    with torch.inference_mode():
        ours, sparse = (read_prompt(shape, weights, each, prompt) for each in both(layers))
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for layer, pruned in zip(theirs.model.layers, layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = pruned["qkv"].dense.split((128, 64, 64))
            for module, weight in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj), qkv, strict=True
            ):
                module.weight.copy_(weight)
            gate, up = pruned["gate_up"].dense.chunk(2)
            attention.o_proj.weight.copy_(pruned["o"].dense)
            mlp.gate_proj.weight.copy_(gate)
            mlp.up_proj.weight.copy_(up)
            mlp.down_proj.weight.copy_(pruned["down"].dense)
        expected = theirs(prompt).logits
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sparse, expected, rtol=1e-3, atol=1e-4)


def write_sparse(directory, shape, layers, dtype=torch.float32):
    """A checkpoint as the exporter bakes it, of what was pruned for the GPU."""
    from permllm_vllm.checkpoint.schema import QuantizationConfig
    from permllm_vllm.checkpoint.writer import write_checkpoint

    transformers = pytest.importorskip("transformers")
    names = [field.name for field in dataclasses.fields(Shape) if field.name != "rope_theta"]
    config = transformers.LlamaConfig(**{name: getattr(shape, name) for name in names})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory / "dense")
    _, dense = load(directory / "dense", torch.float32, CPU)
    tensors = {name: tensor for name, tensor in dense.items() if "_proj" not in name}
    permuted = []
    rows = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "gate_proj": 192, "up_proj": 192}
    for i, layer in enumerate(layers):
        for merged, parts in MERGED.items():
            weights, start = layer[merged].weights, 0
            for name in parts:
                module = f"model.layers.{i}.{name}"
                count = rows.get(name.rpartition(".")[2], 128)
                some = slice(start, start := start + count)
                tensors[f"{module}.weight_packed"] = weights.values[some].clone()
                tensors[f"{module}.weight_mask"] = weights.mask[some].clone()
                if weights.permutation is not None:
                    tensors[f"{module}.input_permutation"] = weights.permutation.clone()
                    permuted.append(module)
    quantization = QuantizationConfig(
        pattern="2:4", block_size=64, value_dtype="float32", runtime_permuted=permuted,
        ignore=["lm_head"],
    )  # fmt: skip
    write_checkpoint(directory / "sparse", tensors.items(), quantization, directory / "dense")
    return directory / "sparse", tensors


def test_reads_a_sparse_checkpoint(tmp_path):
    """The same layers as were pruned, and what transformers says of them."""
    layers = list(prune_layers(SMALL, RandomWeights(SMALL, torch.float32, CPU)))
    directory, tensors = write_sparse(tmp_path, SMALL, layers)
    assert is_sparse(directory)
    assert not is_sparse(tmp_path / "dense")
    shape, weights, found = read(directory, torch.float32, CPU)
    assert shape == SMALL
    for name, tensor in weights.items():
        assert torch.equal(tensor, tensors[name])
    found = list(found)
    for layer, expected in zip(found, layers, strict=True):
        for name in MERGED:
            assert torch.equal(layer[name].dense, expected[name].dense)
            assert torch.equal(layer[name].weights.values, expected[name].weights.values)
            assert torch.equal(layer[name].weights.mask, expected[name].weights.mask)
    prompt = torch.randint(64, (3, 9))
    with torch.inference_mode():
        dense, sparse = (read_prompt(shape, weights, each, prompt) for each in both(found))
    torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=1e-4)


def test_projections_in_different_permutations_are_not_merged():
    first, second = (
        next(prune_layers(SMALL, RandomWeights(SMALL, torch.float32, CPU)))["qkv"] for _ in range(2)
    )
    assert merge([first, first], "qkv").dense.shape == (512, 128)
    with pytest.raises(SystemExit, match=r"layer 3 qkv: .* in the same permutation"):
        merge([first, second], "layer 3 qkv")
    with pytest.raises(SystemExit, match="must all be sparse"):
        merge([first, dataclasses.replace(first, weights=None)], "layer 3 qkv")


def test_a_sparse_checkpoint_needs_pydantic(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "permllm_vllm.checkpoint.reader", None)
    with pytest.raises(SystemExit, match="reading one needs"):
        read(tmp_path, torch.float32, CPU)


def test_random_weights_have_the_shapes():
    weights = RandomWeights(SMALL, torch.bfloat16, CPU)
    layer = next(prune_layers(SMALL, weights))
    assert [layer[name].dense.shape for name in ("qkv", "o", "gate_up", "down")] == [
        (256, 128),
        (128, 128),
        (384, 128),
        (128, 192),
    ]
    assert weights["model.norm.weight"].shape == (128,)
    assert weights["lm_head.weight"].shape == (64, 128)


def test_a_tied_head_is_the_embedding(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dataclasses.asdict(SMALL)
    del sizes["rope_theta"]
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    _, weights = load(tmp_path, torch.float32, CPU)
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_layer_as_the_checkpoint_holds_it_is_dropped_before_the_next():
    """Beside all that was packed of it, Llama-2-7B does not fit a GPU of 24 GB."""
    earlier = []

    def watched(layer):
        assert not any(reference() for reference in earlier)
        earlier.extend(weakref.ref(each.weights) for each in layer.values())
        return layer

    weights = RandomWeights(SMALL, torch.bfloat16, CPU)
    models = both(map(watched, prune_layers(SMALL, weights)))
    assert [len(linears) for linears in models] == [2, 2]
    assert len(earlier) == 8
    assert not any(reference() for reference in earlier)


def test_the_forecast_of_a_decoder_layer_is_what_its_tensors_take():
    shape = dataclasses.replace(SMALL, intermediate_size=256)
    weights = RandomWeights(shape, torch.bfloat16, CPU)
    layers = list(prune_layers(shape, weights))
    taken = 0
    for each in layers[0].values():
        packed = CudaBackend(torch.bfloat16).pack(each.weights)
        taken += each.dense.nbytes + packed.packed.nbytes + packed.metadata.nbytes
    cache = Llama(shape, weights, both(layers)[0], 3, 16).cache[0]
    assert memory.layer_bytes(shape, 3, 16) == taken + cache.nbytes


@pytest.mark.parametrize(("gib", "layers"), [(80, 32), (26, 32), (23, 27), (15.5, 16)])
def test_as_many_layers_of_llama_2_7b_as_fit(gib, layers):
    shape = memory.fitting(Shape(), int(gib * memory.GIB), 64, 32, 97)
    assert shape == dataclasses.replace(Shape(), num_hidden_layers=layers)


def test_a_gpu_without_room_for_a_layer_is_refused():
    with pytest.raises(
        SystemExit, match=r"4\.0 GiB .* are free, .* takes 4\.6 .*fewer --sequences"
    ):
        memory.fitting(Shape(), 4 * memory.GIB, 64, 32, 97)


def test_says_how_many_layers_fitted_and_packs_each_once(monkeypatch, tmp_path, capsys):
    packed = []

    class Counting:
        def __init__(self, *arguments):
            self.backend = select_backend(*arguments)

        def pack(self, weights):
            packed.append(weights.values.shape)
            return self.backend.pack(weights)

    def generate(model, prompt, tokens):
        model.step()
        logits = model.logits.float().log_softmax(-1)
        return Outcome(model.token.unsqueeze(1), logits.unsqueeze(0), 1.0)

    monkeypatch.setattr(pruned, "select_backend", Counting)
    monkeypatch.setattr(generation, "CUDA", CPU)
    monkeypatch.setattr(generation, "Shape", lambda: SMALL)
    monkeypatch.setattr(generation, "generate", generate)
    monkeypatch.setattr(generation, "fallback_reason", lambda *_: None)
    monkeypatch.setattr(memory, "RESERVE", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (600_000, 1 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setenv("PERMLLM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "generation.json"
    options = ["--sequences", "1", "2", "--tokens", "3", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["generation", *options])
    generation.main()
    result = json.loads(file.read_text())
    assert result["num_hidden_layers"] == 1
    assert [row["sequences"] for row in result["rows"]] == [1, 2]
    assert len(packed) == len(MERGED)
    assert "1 of 2 decoder layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "far"), [(0.0, False), (TOLERANCE / 2, False), (0.5, True), (float("nan"), True)]
)
def test_models_that_differ_are_a_failure(change, far):
    logits = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0))
    dense = Outcome(torch.zeros(2, 3, dtype=torch.int64), logits.log_softmax(-1), 20.0)
    other = dense.log_probabilities.clone()
    other[3, 1, other[3, 1].argmax()] += change
    row = compare(2, dense, Outcome(dense.tokens, other, 10.0))
    assert row["speedup"] == 2
    assert row["same_tokens"] == 1
    if far:
        with pytest.raises(SystemExit, match="differ by more than"):
            require_equal([row])
    else:
        require_equal([row])
