"""A tiny random model, pruned: sparse in the format, and as dense with zeros."""

from pathlib import Path

import pytest
import torch

from tests.offline.tiny_models import save_tokenizer, tiny_llama
from tests.serving.checkpoints import Twins, prune


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    directory = tmp_path_factory.mktemp("hf")
    model = tiny_llama(tie_word_embeddings=True, attention_bias=True)
    model.to(torch.bfloat16).save_pretrained(directory / "source")
    save_tokenizer(directory / "source")
    return prune(directory / "source", directory)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def sparse_copy(twins: Twins, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(twins.sparse, tmp_path / "sparse"))
