"""A model without the memory of its weights gives what the whole one gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.calibration.statistics import last_hidden_state
from permllm_offline.model.decoder_calls import record_calls
from permllm_offline.model.loading import load_model, open_source
from permllm_offline.model.lookup import family_of
from permllm_offline.pruning.streamed_model import StreamedModel
from permllm_offline.pruning.streamed_windows import Flow
from permllm_offline.text.evaluation import perplexity
from tests.offline.tiny_models import tiny_model

CPU = torch.device("cpu")


def held(model: Any) -> dict[str, bool]:
    """Whether each parameter outside the decoder layers has memory for its elements."""
    return {
        name: parameter.untyped_storage().nbytes() == parameter.nbytes
        for name, parameter in model.named_parameters()
        if not parameter.is_meta
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen3_5_text", "gemma3_text", "opt", "gpt_neox", "qwen3_moe"],
)
def test_embeddings_and_head_are_there_while_they_are_at_work(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    tiny_model(model_type, tie_word_embeddings=tied).save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    family = family_of(source.config)
    whole = load_model(source, torch.float32, CPU)
    windows = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    streamed = StreamedModel(source, family, torch.float32, CPU)
    model = streamed.model
    ends = {model.get_input_embeddings().weight: "in", model.get_output_embeddings().weight: "out"}
    names = {ends[one]: name for name, one in model.named_parameters() if one in ends}
    assert len(names) == (1 if tied else 2)

    assert not any(held(model).values())
    with streamed.embedding():
        assert [name for name, there in held(model).items() if not there] == (
            [] if tied else [names["out"]]
        )
    with streamed.head():
        left = set() if tied else {names["in"]}
        assert {name for name, there in held(model).items() if not there} == left
    assert not any(held(model).values())

    calls = record_calls(whole, family, windows)
    assert torch.equal(Flow.into(streamed, windows).dense.hidden, calls.states.hidden)
    states = last_hidden_state(whole, family, windows[:1]).detach()
    for window in windows[1:]:
        states = torch.cat([states, last_hidden_state(whole, family, window[None]).detach()])
    assert streamed.perplexity(windows, states, "") == perplexity(whole, windows)
    assert not any(held(model).values())
