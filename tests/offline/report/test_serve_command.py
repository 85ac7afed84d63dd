"""The command that a user pastes to serve a checkpoint."""

import pytest
from transformers import CohereConfig, Gemma3Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from permllm_offline.report.serve_command import serve_command


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (LlamaConfig(max_position_embeddings=131072), 4096),
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (GPTNeoXConfig(max_position_embeddings=512), 512),
        (Gemma3Config(text_config={"max_position_embeddings": 1024}), 1024),
        (PretrainedConfig(), 4096),  # which says no limit
        (CohereConfig(), 3200),  # 40 layers of 64 heads of 128, which take 1.25 MiB for each token
    ],
    ids=lambda value: str(getattr(value, "model_type", value)),
)
def test_requests_are_bounded(config: PretrainedConfig, longest: int) -> None:
    assert serve_command("a model", config) == (
        f"VLLM_CPU_KVCACHE_SPACE=4 vllm serve 'a model' --max-model-len {longest}"
    )
