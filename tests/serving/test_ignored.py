"""What `prune --ignore` left dense is served dense, beside sparse layers that it fed.

A tiny random model of bfloat16 values, which a kernel multiplies with float32 exactly, is compared
to the same weights in a plain checkpoint.
"""

import pytest

from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.pipeline import prune
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_vllm.checkpoint.reader import CheckpointReader
from tests.conversion.sparse_models import save_dense
from tests.offline.tiny_models import random_text
from tests.serving.engine import Engines, Prompt

pytestmark = pytest.mark.serving

PROMPTS: list[Prompt] = [[5, 6, 7, 8], [40, 3, 21], range(2, 58, 3)]


def test_tokens_are_those_of_the_plain_checkpoint(
    engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("ignored")
    source, text = save_dense(place / "source"), place / "text.txt"
    text.write_text(random_text(2000, seed=1), encoding="utf-8")
    data = {"dataset": str(text), "num_samples": 6, "sequence_length": 16}
    # Of one layer what feeds o, of the other what feeds down: both are then permuted at run time.
    ignore = [r"re:model\.layers\.0\.self_attn\.[qkv]_proj", r"re:.*\.1\.mlp\.(gate|up)_proj"]
    prune(
        make_recipe({"model": str(source), "method": "wanda+cp", "ignore": ignore} | data),
        place / "sparse",
    )
    quantization = CheckpointReader(place / "sparse").quantization
    assert quantization is not None
    assert {"model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"} <= {
        *quantization.runtime_permuted
    }
    convert_to_dense(str(place / "sparse"), place / "dense")
    sparse, dense = (
        engines.run(place / name, PROMPTS, tokens=16, max_model_len=128)
        for name in ("sparse", "dense")
    )
    # Of four layers as vLLM fuses them, in each of two decoder layers, one is dense.
    assert (sparse.backends, dense.backends) == ({"cpu bfloat16": 6}, {})
    assert sparse.tokens() == dense.tokens()
    assert sparse.difference(dense) < 1e-4
