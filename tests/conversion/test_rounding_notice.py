"""Papers beside rounded weights say so; those of other tools stay as they are."""

import json
from pathlib import Path

import pytest
import torch

from permllm_offline import pipeline
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.report import page
from permllm_offline.report.papers import CARD, COSTS, PAGE, PAPERS, RECIPE, REPORT
from tests.conversion.sparse_models import load_all, prune

NOTICE = "of 14 sparse linear layers were rounded to int8"


def one_line(path: Path, mark: str = "") -> str:
    text = path.read_text().replace(f"\n{mark}", " ") if mark else path.read_text()
    return " ".join(text.split())


def test_papers_of_a_prune_say_it(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_plots", lambda report: [])
    (sparse, pruned_int8, int8) = (tmp_path / name for name in ("sparse", "pruned", "int8"))
    entries = {"model": str(dense), "method": "magnitude", "evaluation_windows": 0}
    pipeline.prune(make_recipe(entries), sparse)
    older = json.loads((sparse / REPORT).read_text())
    for layer in older["layers"]:  # as a report before the new name
        layer["int8_error"] = layer.pop("rounding_error")
    (sparse / REPORT).write_text(json.dumps(older))
    pipeline.prune(make_recipe(entries | {"values": "int8"}), pruned_int8)
    convert_to_sparse(str(sparse), int8, values="int8")

    card, before = (int8 / CARD).read_text(), (sparse / CARD).read_text()
    header, _, rest = before.removeprefix("---\n").partition("---\n")
    assert card.startswith(f"---\n{header}---\n\n> The bfloat16 values {NOTICE}")
    assert card.endswith(rest.lstrip())
    assert "without calibration data" in one_line(int8 / CARD, "> ")

    assert (int8 / RECIPE).read_bytes() == (sparse / RECIPE).read_bytes()

    # Without data, pruning to int8 rounds the same weights for the same error.
    report, before, other = (
        json.loads((d / REPORT).read_text()) for d in (int8, sparse, pruned_int8)
    )
    assert NOTICE in report.pop("rounded_afterwards")
    for one, old, same in zip(report["layers"], before["layers"], other["layers"], strict=True):
        assert one.pop("rounding_error") == pytest.approx(same["rounding_error"], rel=1e-4)
        assert old.pop("int8_error") is None
    assert report == before
    for name, tensor in load_all(pruned_int8).items():
        found = load_all(int8)[name]
        if tensor.is_floating_point():
            assert torch.allclose(found, tensor, rtol=1e-5, atol=0), name
        else:  # where a scale differs in its last bit, a half may be rounded to the other side
            assert (found.int() - tensor.int()).abs().max() <= 1, name
            assert (found != tensor).float().mean() < 1e-3, name

    assert (int8 / COSTS).read_bytes() == (sparse / COSTS).read_bytes()
    assert f"</h1>\n<p>The bfloat16 values {NOTICE}" in (int8 / PAGE).read_text()


def test_files_of_other_tools_stay_as_they_are(dense: Path, tmp_path: Path) -> None:
    source = prune(dense, tmp_path / "source")
    files = {CARD: b"\xff of another tool\n", RECIPE: b"modifiers: []\n", REPORT: b"[1]"}
    for name, content in files.items():
        (source / name).write_bytes(content)
    convert_to_sparse(str(source), tmp_path / "sparse")
    for given in (source, tmp_path / "sparse"):
        output = tmp_path / f"{given.name}-int8"
        convert_to_sparse(str(given), output, values="int8")
        card = (output / CARD).read_bytes()
        assert card.startswith(b"\n> The bfloat16 values " + NOTICE.encode())
        assert card.endswith(b"\n\n" + files[CARD])
        for name in (RECIPE, REPORT):
            assert (output / name).read_bytes() == files[name]
        (output / REPORT).write_text('{"of": "another tool"}')
    (source / CARD).unlink()
    (source / REPORT).write_text('{"of": "another tool"}')
    convert_to_sparse(str(source), tmp_path / "bare", values="int8")
    written = {path.name for path in (tmp_path / "bare").iterdir()}
    assert written & set(PAPERS) == {RECIPE, REPORT}
    assert json.loads((tmp_path / "bare" / REPORT).read_text()) == {"of": "another tool"}
