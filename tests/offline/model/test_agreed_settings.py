from typing import Any

import pytest
from transformers import AutoConfig

from permllm_offline.errors import OfflineError
from permllm_offline.model.agreed_settings import AGREED
from permllm_offline.model.lookup import family_of
from tests.offline.tiny_models import COMMON, SIZES


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("afmoe", "score_func", "softmax"),
        ("afmoe", "n_group", 2),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v3", "topk_method", None),
        ("olmoe", "clip_qkv", 0.5),
        ("ernie4_5_moe", "use_bias", True),
        ("exaone_moe", "swiglu_limits", [0.0, 7.0]),
        ("exaone_moe", "sliding_windows", [None, 128]),
        ("minimax_m2", "use_routing_bias", False),
        ("nemotron_h", "mlp_hidden_act", "silu"),
        ("nemotron_h", "sliding_window", 128),
        ("nemotron_h", "mlp_bias", True),
        ("glm4_moe_lite", "rope_interleave", False),
    ],
)
def test_settings_that_only_one_reads_are_refused(model_type: str, name: str, value: Any) -> None:
    config = AutoConfig.for_model(model_type, **(COMMON | SIZES[model_type]))
    family_of(config)
    setattr(config, name, value)
    with pytest.raises(OfflineError, match=f"^{name} is .*, which vLLM and Transformers, .* alike"):
        family_of(config)


def test_lists_of_nothing_are_nothing() -> None:
    config = AutoConfig.for_model("exaone_moe")
    for name in AGREED["exaone_moe"]:
        setattr(config, name, [None, None])
    family_of(config)


def test_settings_of_experts_are_those_of_models_that_have_any() -> None:
    config = AutoConfig.for_model("nemotron_h", hybrid_override_pattern="M*-", mlp_bias=True)
    family_of(config)
