"""Converted checkpoints serve the same tokens as the checkpoints that they were made from.

A tiny random model, in float32. What vLLM no longer reads (a bitmask) is compared to the same
weights in a plain checkpoint.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from tests.conversion.sparse_models import (
    block_orders,
    in_place,
    prune,
    save_dense,
    write_bitmask,
)
from tests.serving.offline_tokens import TOKENS

pytestmark = pytest.mark.serving

REPOSITORY = Path(__file__).parents[2]
Answers = dict[str, list[dict[str, Any]]]


def greedy_tokens(*models: Path) -> Answers:
    """Serve the models one after the other in one process of their own."""
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [sys.executable, "-m", "tests.serving.offline_tokens", *map(str, models)]
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    place = tmp_path_factory.mktemp("converted")
    dense = save_dense(place / "dense", torch.float32)
    folders = {
        "in place": prune(dense, place / "in-place", in_place),
        "permuted back": prune(dense, place / "permuted-back", block_orders()),
    }
    bitmask = write_bitmask(folders["in place"], place / "bitmask")
    for name, source in (("from bitmask", bitmask), ("recovered", folders["permuted back"])):
        folders[name] = place / name.replace(" ", "-")
        convert_to_sparse(str(source), folders[name], strict=True)
    folders["dense again"] = place / "dense-again"
    convert_to_dense(str(folders["recovered"]), folders["dense again"])
    found = greedy_tokens(*folders.values())
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("converted", "twin"),
    [
        ("from bitmask", "in place"),
        ("recovered", "permuted back"),
        ("dense again", "permuted back"),
    ],
)
def test_tokens_are_equal(answers: Answers, converted: str, twin: str) -> None:
    for one, other in zip(answers[converted], answers[twin], strict=True):
        assert len(one["tokens"]) == TOKENS
        assert one["tokens"] == other["tokens"]
        difference = torch.tensor(one["log_probabilities"]) - torch.tensor(
            other["log_probabilities"]
        )
        assert difference.abs().max() < 1e-4


def test_the_two_models_differ(answers: Answers) -> None:
    tokens = {
        name: [answer["tokens"] for answer in answers[name]] for name in ("in place", "recovered")
    }
    assert tokens["in place"] != tokens["recovered"]
