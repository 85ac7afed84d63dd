"""Converted checkpoints serve the same tokens as the checkpoints that they were made from.

A tiny random model of bfloat16 values, which a kernel multiplies with float32 exactly. What vLLM
no longer reads (a bitmask) is compared to the same weights in a plain checkpoint.
"""

import pytest

from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from tests.conversion.sparse_models import (
    permute,
    prune,
    save_dense,
    write_bitmask,
)
from tests.serving.engine import Engines, Prompt, Run

pytestmark = pytest.mark.serving

PROMPTS: list[Prompt] = [[5, 6, 7, 8], [40, 3, 21], range(2, 58, 3)]
TOKENS = 16


@pytest.fixture(scope="module")
def answers(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    place = tmp_path_factory.mktemp("converted")
    dense = save_dense(place / "dense")
    in_place = prune(dense, place / "in-place")
    sparse, plain = permute(dense, place)
    folders = {"in place": in_place, "permuted": sparse, "in original order": plain}
    folders["from bitmask"] = place / "from-bitmask"
    bitmask = write_bitmask(in_place, place / "bitmask")
    convert_to_sparse(str(bitmask), folders["from bitmask"], strict=True)
    folders["dense again"] = place / "dense-again"
    convert_to_dense(str(sparse), folders["dense again"])
    return {
        name: engines.run(folder, PROMPTS, tokens=TOKENS, max_model_len=128)
        for name, folder in folders.items()
    }


def test_a_kernel_serves_what_was_converted_to_sparse(answers: dict[str, Run]) -> None:
    served = {name: run.backends for name, run in answers.items() if run.backends}
    assert served == {name: {"cpu bfloat16": 8} for name in ("from bitmask", "permuted")}


@pytest.mark.parametrize(
    ("converted", "twin"),
    [
        ("from bitmask", "in place"),
        ("permuted", "in original order"),
        ("dense again", "in original order"),
    ],
)
def test_tokens_are_equal(answers: dict[str, Run], converted: str, twin: str) -> None:
    assert answers[converted].tokens() == answers[twin].tokens()
    assert answers[converted].difference(answers[twin]) < 1e-4


def test_the_two_models_differ(answers: dict[str, Run]) -> None:
    assert answers["in place"].tokens() != answers["permuted"].tokens()
