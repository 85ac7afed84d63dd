"""The parts of a decoded token are found in the worker of a real engine."""

import pytest

from benchmarks import decode_profile
from benchmarks.engines.engine import Engine
from benchmarks.engines.step_parts import AROUND_EXPERTS, BETWEEN, DENSE, EXPERTS, PARTS
from tests.serving.checkpoints import Twins

pytestmark = pytest.mark.serving


def test_every_part_of_a_token_is_found(tiny: Twins) -> None:
    engine = Engine(tiny.sparse, eager=True)
    try:
        found = decode_profile.profile(engine, sequences=3)
    finally:
        engine.close()
    milliseconds = {row["part"]: row["milliseconds"] for row in found["rows"]}
    of_mixtures = EXPERTS, AROUND_EXPERTS
    assert list(milliseconds) == [part for part in PARTS if part not in of_mixtures]
    assert found["unwatched_ms"] > 0
    assert milliseconds.pop(DENSE) == 0  # every linear layer but the head is sparse
    assert all(value > 0 for part, value in milliseconds.items() if part != BETWEEN)
