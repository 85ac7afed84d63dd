"""vLLM's benchmark of a server says what is read; an engine ends beyond its memory limit."""

from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.engines.engine import Engine, EngineError
from benchmarks.engines.vllm_bench import measured
from benchmarks.models import random_model, word_tokenizer

pytestmark = pytest.mark.serving

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1,
    "vocab_size": 10240,  # vLLM draws the tokens of its latency benchmark below 10000
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(models, "SHAPES", {"tiny": SHAPE})
        made = random_model("tiny")
        word_tokenizer(made).rename(made.parent / "words")
    return made


def test_the_benchmark_of_a_server_says_what_is_read(model: Path) -> None:
    found = measured("serve", model, model.parent / "words", (2, 48), eager=True)
    assert set(found) == {"tokens_per_second", "median_ttft_ms", "median_tpot_ms"}
    assert all(value > 0 for value in found.values())


def test_an_engine_ends_beyond_its_memory_limit(model: Path) -> None:
    with pytest.raises(EngineError, match=r"MiB, more than 0.25 GiB: give a higher"):
        Engine(model, eager=True, memory_limit=0.25)
