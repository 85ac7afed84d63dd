"""Mixture of experts: sparse ones are multiplied by our kernels, ignored ones by vLLM's."""

from pathlib import Path

import pytest

from permllm_vllm.checkpoint.errors import CheckpointError
from tests.serving.checkpoints import Twins, corrupt, prune, random_mixtral
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving

TOLERANCE = 1e-4  # measured 2e-6
TRACED = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}
EXPERTS, ROUTER = r"re:.*\.experts(\..*)?", r"re:.*\.gate"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_mixtral(tmp_path_factory.mktemp("mixtral") / "parent")


@pytest.fixture(scope="module")
def twins(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return prune(parent, tmp_path_factory.mktemp("experts"), ignore=["lm_head", ROUTER])


def test_sparse_experts_are_served(engines: Engines, twins: Twins) -> None:
    dense = engines.run(twins.dense, PROMPTS)
    sparse = engines.run(twins.sparse, PROMPTS)
    assert sparse.backends == {"cpu bfloat16": 4, "experts cpu bfloat16": 2}
    assert sparse.tokens() == dense.tokens()
    assert sparse.difference(dense) < TOLERANCE


def test_compiled_as_eager(engines: Engines, twins: Twins) -> None:
    eager = engines.run(twins.sparse, PROMPTS)
    compiled = engines.run(twins.sparse, PROMPTS, enforce_eager=False, compilation_config=TRACED)
    assert compiled.backends == eager.backends
    assert compiled.tokens() == eager.tokens()
    assert compiled.difference(eager) < TOLERANCE


@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole experts"])
def test_two_ranks(engines: Engines, twins: Twins, whole: bool) -> None:
    """Each rank has half of every expert, or every second expert."""
    one = engines.run(twins.sparse, PROMPTS)
    two = engines.run(twins.sparse, PROMPTS, tensor_parallel_size=2, enable_expert_parallel=whole)
    assert two.backends == {kernel: 2 * layers for kernel, layers in one.backends.items()}
    assert two.tokens() == one.tokens()
    assert two.difference(one) < TOLERANCE


def test_one_expert_is_noticed(engines: Engines, twins: Twins, tmp_path: Path) -> None:
    """The negative control of the limit above: half of the blocks of one expert of eight."""
    tensor = "model.layers.1.block_sparse_moe.experts.2.w2.weight_packed"
    damaged = engines.run(corrupt(twins.sparse, tmp_path / "damaged", tensor, 256), PROMPTS)
    sparse = engines.run(twins.sparse, PROMPTS)
    assert damaged.mean_prompt_difference(sparse) > TOLERANCE


def test_ignored_experts_are_vllms(engines: Engines, parent: Path, tmp_path: Path) -> None:
    ignore = ["lm_head", EXPERTS, ROUTER]
    twins = prune(parent, tmp_path, ignore=ignore, experts=False)
    dense = engines.run(twins.dense, PROMPTS)
    sparse = engines.run(twins.sparse, PROMPTS)
    assert sparse.backends == {"cpu bfloat16": 4}
    assert sparse.tokens() == dense.tokens()
    assert sparse.difference(dense) < TOLERANCE


def test_dense_experts_must_be_ignored(engines: Engines, parent: Path, tmp_path: Path) -> None:
    twins = prune(parent, tmp_path, ignore=["lm_head", ROUTER], experts=False)
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.w1\.weight is in the checkpoint.*ignore"
    ):
        engines.run(twins.sparse, PROMPTS)
