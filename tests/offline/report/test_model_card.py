"""What a model card takes over from the base model's own."""

from pathlib import Path

import pytest

from permllm_offline.report.model_card import base_license


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("license: mit", "mit"),
        ("license: mit\ndate: 2024-02-30", "unknown"),  # no such day, so nothing of it is read
        ("license: [mit", "unknown"),
        ("- mit", "unknown"),
        ("tags: [text]", "unknown"),
    ],
)
def test_the_licence_is_that_of_the_header(header: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Model\n", encoding="utf-8")
    assert base_license(tmp_path) == expected
