"""The blocks of `docs/interoperability.md` run, in order, and do what the page says."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from permllm_offline.cli import main
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import (
    load_all,
    masks_of,
    prune,
    save_dense,
    write_bitmask,
    write_masks,
)
from tests.conversion.test_decompression import quantize
from tests.offline.tiny_models import random_text
from tests.offline.tiny_multimodal import tiny_multimodal

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

DOCUMENT = Path(__file__).parents[2] / "docs" / "interoperability.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
WRITTEN = (
    "sparse",
    "sparse-with-images",
    "from-zeros",
    "from-bitmask",
    "from-masks",
    "from-zeros-again",
    "sparse-int8",
    "sparse-int4",
    "from-zeros-int8",
    "without-text-int8",
    "from-python-int8",
)
"""Checkpoints of this format that the blocks leave."""
CAPITALS = [("w1 w2", ["w3", "w4"], 0), ("w5 w6", ["w7", "w8"], 1), ("w9", ["w10", "w11"], 0)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    dense = save_dense(tmp_path / "model", max_position_embeddings=512)
    plain = prune(dense, tmp_path / "wanda-2of4")
    write_bitmask(plain, tmp_path / "bitmask")
    quantize(dense, tmp_path / "w4a16", "int4")
    write_masks(tmp_path / "masks/mask_compressed.npz", masks_of(plain))
    tiny_multimodal("gemma3", tmp_path / "model-with-images")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.txt").write_text(random_text(70_000, seed=1), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    lines = [dict(zip(("question", "choices", "answer"), one, strict=True)) for one in CAPITALS]
    (tmp_path / "tasks" / "capitals.jsonl").write_text("\n".join(map(json.dumps, lines)))
    [task] = [text for language, text in BLOCKS if language == "yaml"]
    (tmp_path / "tasks" / "capitals.yaml").write_text(task)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, str(DOCUMENT), "exec"), names)
        elif language == "bash":
            for line in text.splitlines():
                command, *arguments = shlex.split(line)
                assert command == "permllm-offline"
                assert main(arguments) == 0, line
        else:
            assert language == "yaml"
    shown = capsys.readouterr().out
    assert "SparseLinear(in_features=128" in shown
    assert "2:4 14 {" in shown
    assert "acc" in json.loads((workplace / "capitals.json").read_text())["tasks"]["capitals"]
    for name in WRITTEN:
        assert validate(workplace / name) == []
    sparse, saved = load_all(workplace / "sparse"), load_all(workplace / "saved")
    assert sparse.keys() == saved.keys()
    assert json.loads((workplace / "from-zeros.json").read_text())["pattern"] == "2:4"
