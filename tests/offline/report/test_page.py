"""The page shows what report.json and costs.json hold, and needs nothing but itself."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from permllm_offline.model.loading import Source
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.reconstruction.layer_work import LayerError
from permllm_offline.report.mask_example import MaskExample
from permllm_offline.report.page import report_page
from permllm_offline.report.plots import curve_plot, error_plot, tuning_plot
from permllm_offline.report.report import CalibrationRecord, LayerReport, Report
from permllm_offline.run.costs import Cost
from permllm_offline.text.windows import CalibrationWindows

COSTS = [Cost("dense-perplexity", 1.254, 3_000_000_000, 2.5), Cost("layer-0000", 20.5, None)]
NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
CURVE = [
    {"step": 0, "validation_loss": 0.5},
    {"step": 1, "loss": 0.4},
    {"step": 2, "loss": 0.3, "validation_loss": 0.35},
]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    text = tmp_path / "<b>text.txt"
    text.write_text("words")
    recipe = make_recipe({"model": str(tmp_path), "dataset": str(text), "seed": 7})
    layers = [
        LayerReport(name, 192, 128, "folded", 0.8125, 0.7034 + number / 10, 49152, 27776, 0.0123)
        for number, name in enumerate(NAMES)
    ]
    return Report(
        recipe=recipe,
        tool_version="0.1.0",
        perplexity_before=22.163,
        perplexity_after=49.447,
        learning_curve=CURVE,
        reconstruction=[LayerError("0", 0.21234, 0.1), LayerError("1", 0.41, 0.3)],
        reconstruction_curve=CURVE,
        layers=layers,
        output_errors=[0.09876, 0.28],
        mask_example=MaskExample(NAMES[1], ["0101", "1100"], ["0011", "1100"]),
    )


def page_of(report: Report, directory: Path, costs: list[Cost] = COSTS) -> str:
    return report_page(report, costs, Source(str(directory), directory, None), "sparse")


class Page(HTMLParser):
    """Cells of the tables by id, titles, and every attribute that may load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self._table = self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        entries = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.sources += [entries[name] for name in ("src", "href", "srcset") if name in entries]
        self._open = tag
        if tag == "table":
            self._table = entries["id"]
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag == "h2":
            self.titles.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("td", "th"):
            self.tables[self._table][-1][-1] += data
        elif self._open == "h2":
            self.titles[-1] += data


def test_numbers_are_those_of_the_report(report: Report, tmp_path: Path) -> None:
    page, known = Page(page_of(report, tmp_path)), json.loads(report.to_json())
    summary = dict(page.tables["summary"])
    assert summary["perplexity dense, held-out windows"] == f"{known['perplexity_before']:.2f}"
    assert summary["perplexity sparse, held-out windows"] == f"{known['perplexity_after']:.2f}"
    assert summary["their bytes, against dense"] == f"{known['byte_ratio'] * 100:.1f} %"
    assert summary["pattern, block size, seed"] == "2:4, 64, 7"
    assert summary["time of the steps below"] == "21.8 s"
    head, *linears = page.tables["linear-layers"]
    assert len(linears) == len(known["layers"]) == 2
    for row, layer in zip(linears, known["layers"], strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["layer"] == layer["name"]
        assert cells["shape"] == "192 x 128"
        assert cells["importance kept"] == f"{layer['retained_importance'] * 100:.2f} %"
        assert cells["channels moved"] == f"{layer['moved_channels'] * 100:.1f} %"
        assert cells["bytes"] == f"{layer['sparse_bytes']:,}"
        assert cells["rounding error"] == f"{layer['rounding_error'] * 100:.2f} %"
    for index, row in enumerate(page.tables["decoder-layers"][1:]):
        error = known["reconstruction"][index]
        numbers = (error["before"], error["after"], known["output_errors"][index])
        assert row == [str(index), *(f"{number:.4g}" for number in numbers)]
    assert page.tables["costs"][1:] == [
        ["dense-perplexity", "1.25", "2.50", "3.00 GB"],
        ["layer-0000", "20.50", "0.00", ""],
    ]


def test_errors_before_distillation_have_a_column(report: Report, tmp_path: Path) -> None:
    distilled = replace(report, reconstruction=[], masked_errors=[0.5, 0.75])
    rows = Page(page_of(distilled, tmp_path)).tables["decoder-layers"]
    assert rows == [
        ["decoder layer", "before distillation", "at the end"],
        ["0", "0.5", "0.09876"],
        ["1", "0.75", "0.28"],
    ]


def test_errors_before_learning_have_a_column(report: Report, tmp_path: Path) -> None:
    learned = replace(report, reconstruction=[], reallocated_errors=[0.6, 0.87654])
    rows = Page(page_of(learned, tmp_path)).tables["decoder-layers"]
    assert rows == [
        ["decoder layer", "before learning", "at the end"],
        ["0", "0.6", "0.09876"],
        ["1", "0.8765", "0.28"],
    ]
    assert "reallocation, before learning" in error_plot(learned)
    assert "reallocation, before learning" not in error_plot(report)


def test_text_of_the_model_itself_is_named(report: Report, tmp_path: Path) -> None:
    windows = CalibrationWindows(torch.tensor([[1, 2]]), torch.tensor([[3, 4]]))
    own = torch.tensor([[5, 6], [7, 8], [9, 10]])
    plain, mixed = CalibrationRecord.of(windows), CalibrationRecord.of(windows, own)
    assert plain.tokens_sha256 == mixed.tokens_sha256
    tokens = b"".join(token.to_bytes(8, "little") for token in range(5, 11))
    assert mixed.own_tokens_sha256 == hashlib.sha256(tokens).hexdigest()
    summary = dict(Page(page_of(replace(report, calibration=mixed), tmp_path)).tables["summary"])
    assert summary["calibration"].endswith(", and 3 that the base model wrote itself")
    assert summary["SHA-256 of the data set's tokens"] == plain.tokens_sha256
    assert summary["SHA-256 of the tokens that the model wrote"] == mixed.own_tokens_sha256
    summary = dict(Page(page_of(replace(report, calibration=plain), tmp_path)).tables["summary"])
    assert "itself" not in summary["calibration"]
    assert not any("the model wrote" in name for name in summary)


def test_nothing_outside_is_needed_or_named(report: Report, tmp_path: Path) -> None:
    text = page_of(report, tmp_path)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.sources) == 5
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        assert str(tmp_path) not in svg
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        for element in root.iter():
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:")), value
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", svg))
        assert "@import" not in svg
    outside = re.sub(r"base64,[\w+/=]+", "", text)
    assert "://" not in outside
    assert str(tmp_path) not in outside
    assert tmp_path.name in outside  # the model's name alone
    assert "&lt;b&gt;text" in outside


def test_plots_show_what_there_is(report: Report, tmp_path: Path) -> None:
    assert Page(page_of(report, tmp_path)).titles == [
        "Summary",
        "Learning the permutations",
        "Distilling the kept weights",
        "Error of each decoder layer",
        "Retained importance",
        "The mask, before and after",
        "Decoder layers",
        "Linear layers",
        "Time and memory",
    ]
    bare = replace(
        report,
        perplexity_before=None,
        perplexity_after=None,
        learning_curve=[],
        reconstruction=[],
        reconstruction_curve=[],
        output_errors=[],
        mask_example=None,
    )
    page = Page(page_of(bare, tmp_path, []))
    assert page.titles == ["Summary", "Retained importance", "Linear layers"]
    assert not any("perplexity" in row[0] for row in page.tables["summary"])


def test_captions_say_how_masks_were_chosen(report: Report, tmp_path: Path) -> None:
    found = captions(page_of(report, tmp_path))
    assert "Share of the importance that lies on" in found
    assert "kept after the channels were permuted." in found
    recipe = report.recipe.model_copy(update={"reconstruction": "sparsegpt"})
    page = page_of(replace(report, recipe=recipe), tmp_path)
    assert "Share of the damage that removing each weight alone would do" in captions(page)
    assert "by masks chosen while weights are updated." in captions(page)
    assert f"{recipe.method}, reconstruction sparsegpt: importances of" in page


def captions(page: str) -> str:
    return " ".join(re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL))


def test_spans_that_learn_have_lines_of_their_own(report: Report, tmp_path: Path) -> None:
    assert "Distance of the last hidden state" in captions(page_of(report, tmp_path))
    assert "validation windows" in curve_plot(CURVE, "cosine distance")
    spans = ((0, 1), (2, 2))
    joined = [
        entry | {"step": 3 * number + entry["step"], "first_layer": first, "last_layer": last}
        for number, (first, last) in enumerate(spans)
        for entry in CURVE
    ]
    drawn = curve_plot(joined, "cosine distance")
    assert "layers 0-1" in drawn
    assert "layer 2<" in drawn
    lines = re.findall(r'<path d="M[^"]*" clip-path', drawn)
    assert max(line.count("L") for line in lines) == 1  # two points each: none joins the spans
    recipe = make_recipe(
        {"model": str(tmp_path), "method": "permllm-wanda", "learning": {"scope": "window"}}
    )
    text = captions(page_of(replace(report, recipe=recipe, learning_curve=joined), tmp_path))
    assert "last hidden state" not in text
    assert "its own lowest validation loss" in text


def test_layers_that_were_tuned_show_their_steps(report: Report, tmp_path: Path) -> None:
    errors = [replace(error, curve=CURVE) for error in report.reconstruction]
    tuned = replace(report, reconstruction=errors)
    title = "Tuning the kept weights of each decoder layer"
    assert title in Page(page_of(tuned, tmp_path)).titles
    assert title not in Page(page_of(report, tmp_path)).titles
    assert json.loads(tuned.to_json())["reconstruction"][1]["curve"] == CURVE
    drawn = tuning_plot(errors)
    ticks = [float(tick) for tick in re.findall(r">(\d\.\d+)</text>", drawn)]
    assert min(ticks) == 0.7  # 0.35 of 0.5
    assert max(ticks) == 1.0
    assert "decoder layer" in drawn


def test_the_same_report_gives_the_same_page(report: Report, tmp_path: Path) -> None:
    assert page_of(report, tmp_path) == page_of(report, tmp_path)
