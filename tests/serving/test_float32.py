"""In float32 rounding cannot hide a mistake: sparse and dense models give the same tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving.checkpoints import Twins, corrupt
from tests.serving.engine import Engines, Run
from tests.serving.scoring import text_tokens

pytestmark = pytest.mark.serving

# Largest difference of a log-probability between two engines, measured: 3.3e-5, because a folded
# layer adds up its products in another order. One damaged row of one block changes some by 0.02.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def run(engines: Engines, half: Twins) -> Callable[[Path], Run]:
    text = text_tokens(half.parent, 384)
    prompts = [text, text[0:5], text[30:62], text[90:200]]
    return lambda model: engines.run(model, prompts)


@pytest.fixture(scope="module")
def dense(run: Callable[[Path], Run], half: Twins) -> Run:
    return run(half.dense)


def test_tokens_and_log_probabilities_are_equal(
    run: Callable[[Path], Run], half: Twins, dense: Run
) -> None:
    sparse = run(half.sparse)
    assert (sparse.backends, dense.backends) == ({"cpu bfloat16": 60}, {})
    assert sparse.tokens() == dense.tokens()
    assert sparse.difference(dense) < TOLERANCE


def test_one_damaged_row_is_noticed(
    run: Callable[[Path], Run], half: Twins, dense: Run, tmp_path: Path
) -> None:
    tensor = "model.layers.0.self_attn.o_proj.weight_packed"
    damaged = corrupt(half.sparse, tmp_path / "damaged", tensor, rows=1)
    assert run(damaged).difference(dense) > 10 * TOLERANCE
