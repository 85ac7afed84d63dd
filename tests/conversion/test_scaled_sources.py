"""Sparse models in 8 bits with scales become what the dense models with their zeros become."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import block_orders, prune
from tests.offline.scaled_models import FORMS, write_scaled


@pytest.mark.parametrize("form", FORMS)
def test_zeros_of_8_bits_are_found(form: str, dense: Path, tmp_path: Path) -> None:
    source = prune(dense, tmp_path / "source", block_orders())
    write_scaled(source, tmp_path / "scaled", tmp_path / "back", FORMS[form])
    for name in ("scaled", "back"):
        report = convert_to_sparse(str(tmp_path / name), tmp_path / f"{name}-out", strict=True)
        assert not report.left_dense
    found, expected = (
        load_file(tmp_path / f"{n}-out/model.safetensors") for n in ("scaled", "back")
    )
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert validate(tmp_path / "scaled-out") == []
    config = json.loads((tmp_path / "scaled-out/config.json").read_text())
    assert config["quantization_config"]["value_dtype"] == "bfloat16"
