"""Names that others see have no folders of this machine in them."""

from pathlib import Path

import pytest

from permllm_offline.report.published import public_name, public_recipe


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/home/me/models/tiny", "tiny"),
        ("/home/me/models/tiny/", "tiny"),
        ("~/models/tiny", "tiny"),
        ("me/tiny", "me/tiny"),
        ("Salesforce/wikitext:wikitext-2-raw-v1", "Salesforce/wikitext:wikitext-2-raw-v1"),
        ("here/model", "model"),
        (".", "work"),
        ("..", "of me"),
    ],
)
def test_only_what_is_here_loses_its_folders(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "of me" / "work"
    (work / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(work)
    assert public_name(name) == expected


def test_every_data_set_of_a_recipe_is_looked_at() -> None:
    recipe = {"model": "me/m", "dataset": ["/a/b.txt", "c4"], "seed": 0}
    assert public_recipe(recipe) == recipe | {"dataset": ["b.txt", "c4"]}
    assert public_recipe(recipe | {"dataset": None})["dataset"] is None
