"""Names that a checkpoint chose are shown as they are, whatever markup they look like."""

from typing import Any

import pytest

from permllm_offline.commands.conversion_table import conversion_table
from permllm_offline.commands.plan_tables import outline_table
from permllm_offline.commands.tables import inspection_table, show
from permllm_offline.conversion.report import ConversionReport, ConvertedLinear
from permllm_offline.forecast.outline import Outline, OutlinedLinear
from permllm_offline.inspection.contents import InspectedLayer, Inspection

NAMES = ["a.[red]up[/red]", "a.[/]", "a.[link=file:///etc]up", "a.:warning:", "a.up"]


def inspection(name: str) -> Any:
    layer = InspectedLayer(name, 8, 8, "2:4", "none", "bfloat16", 80, 128, 0.5)
    return inspection_table(Inspection("directory", "2:4", 64, [layer]))


def conversion(name: str) -> Any:
    linear = ConvertedLinear(name, "left dense", 0.5, f"because of {name}")
    return conversion_table(ConversionReport("source", "plain", "permllm", "2:4", 64, [linear]))


def outline(name: str) -> Any:
    linear = OutlinedLinear(name, 8, 8, "none", 128, 80)
    return outline_table(
        Outline(
            model="model", pattern="2:4", block_size=64, value_dtype="bfloat16",
            linears=[linear], dense={f"{name}.dense": 10},
            dense_after={f"{name}.dense": 10},
        )
    )  # fmt: skip


@pytest.mark.parametrize("table", [inspection, conversion, outline])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_markup(table: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(table(name))
    assert f" {name} " in capsys.readouterr().out
