"""Which families begin texts with a token, and which scale their logits."""

from types import SimpleNamespace

from transformers import AutoConfig

from permllm_offline.model.conventions import begin_token, logit_scale
from permllm_offline.model.families import FAMILIES


def test_only_granite_and_cohere_scale_their_logits() -> None:
    scales = {name: logit_scale(AutoConfig.for_model(name)) for name in FAMILIES}
    cohere = {"cohere", "cohere2"}
    assert {name for name, scale in scales.items() if scale != 1} == cohere
    assert {scales[name] for name in cohere} == {1 / 16}
    assert logit_scale(AutoConfig.for_model("granite", logits_scaling=8.0)) == 1 / 8


def test_only_gemma_needs_a_token_before_every_text() -> None:
    needs = {
        name for name in FAMILIES if begin_token(SimpleNamespace(model_type=name, bos_token_id=2))
    }
    assert needs == {name for name in FAMILIES if name.startswith("gemma")}
