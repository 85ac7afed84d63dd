import json
from pathlib import Path

import pytest

from benchmarks.engines.weight_bytes import DecodedWeights, decoded_weights, of_checkpoint
from benchmarks.models import SHAPES


@pytest.mark.parametrize(
    ("name", "linears", "rows", "head", "ratios"),
    [
        ("tinyllama", 968.9e6, 22 * 17920, 65.5e6, (1.69, 2.80, 15.78)),
        ("llama-3.2-1b", 973.1e6, 16 * 23552, 262.7e6, (1.53, 2.17, 4.70)),
        ("llama-2-7b", 6476.0e6, 32 * 42496, 131.1e6, (1.75, 3.06, 50.41)),
        # 8 of 64 experts: 1.18e9 of the 6.92e9 weights, as its makers count
        ("olmoe-1b-7b", 1073.7e6, 16 * (8192 + 8 * 4096), 103.0e6, (1.66, 2.67, 11.42)),
    ],
)
def test_known_models(
    name: str, linears: float, rows: int, head: float, ratios: tuple[float, ...]
) -> None:
    """Llama-2-7B has 6738.4e6 weights, of which the embedding is as large as the head.

    A row of int8 values has a scale and a sum, of 4 bytes each.
    """
    weights = decoded_weights(SHAPES[name])
    assert (weights.linears, weights.head) == pytest.approx((linears, head), rel=1e-3)
    int8 = 5 / 16 + 8 * rows / (2 * linears)
    found = [weights.byte_ratio(share) for share in (9 / 16, int8, 0)]
    assert found == pytest.approx(ratios, abs=0.005)
    assert weights.byte_ratio(1) == 1
    assert weights.byte_ratio(0, 3 / 4) == pytest.approx(4 / 3 * weights.byte_ratio(0))


def test_weights_of_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    sizes = {
        "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "vocab_size": 10,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    file.write_text(json.dumps(sizes))
    # q, k, v, o: 4x4, 2x4, 2x4, 4x4; gate, up, down: 6x4 each
    assert of_checkpoint(tmp_path) == DecodedWeights(2 * (16 + 8 + 8 + 16 + 72), 40)
    file.write_text(json.dumps(sizes | {"head_dim": 3}))
    assert of_checkpoint(tmp_path) == DecodedWeights(2 * (24 + 12 + 12 + 24 + 72), 40)
    file.write_text(json.dumps({"n_embd": 4}))
    assert of_checkpoint(tmp_path) is None
