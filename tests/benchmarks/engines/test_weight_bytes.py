from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks.engines.weight_bytes import DecodedWeights, decoded_weights, of_checkpoint
from benchmarks.models import SHAPES
from permllm_offline.model.language_model import LanguageModel
from permllm_offline.model.loading import Source
from tests.offline.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("name", "linears", "rows", "head", "ratios"),
    [
        ("tinyllama", 968.9e6, 22 * 17920, 65.5e6, (1.69, 2.80, 15.78)),
        ("llama-3.2-1b", 973.1e6, 16 * 23552, 262.7e6, (1.53, 2.17, 4.70)),
        ("llama-2-7b", 6476.0e6, 32 * 42496, 131.1e6, (1.75, 3.06, 50.41)),
        # 24 layers of linear attention (qkv, z, o), 8 of gated attention, all with an MLP
        ("qwen3.5-4b", 3565.2e6, 24 * 14848 + 8 * 12800 + 32 * 20992, 635.7e6, (1.59, 2.39, 6.61)),
    ],
)
def test_known_models(
    name: str, linears: float, rows: int, head: float, ratios: tuple[float, ...]
) -> None:
    """Llama-2-7B has 6738.4e6 weights, of which the embedding is as large as the head.

    A row of int8 values has a scale and a sum, of 4 bytes each.
    """
    config = AutoConfig.for_model(**{"model_type": "llama", **SHAPES[name]})
    weights = decoded_weights(Source(name, Path(name), LanguageModel(config)))
    assert (weights.linears, weights.head) == pytest.approx((linears, head), rel=1e-3)
    int8 = 5 / 16 + 8 * rows / (2 * linears)
    found = [weights.byte_ratio(share) for share in (9 / 16, int8, 0)]
    assert found == pytest.approx(ratios, abs=0.005)
    assert weights.byte_ratio(1) == 1
    assert weights.byte_ratio(0, 3 / 4) == pytest.approx(4 / 3 * weights.byte_ratio(0))


def test_weights_of_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=32, intermediate_size=48, vocab_size=10, head_dim=24)
    model.save_pretrained(tmp_path)
    # q, k, v, o: 48x32, 24x32, 24x32, 32x48; gate, up, down: 48x32 each
    assert of_checkpoint(tmp_path) == DecodedWeights(2 * 32 * (48 + 24 + 24 + 48 + 144), 320)
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    assert of_checkpoint(tmp_path) is None
