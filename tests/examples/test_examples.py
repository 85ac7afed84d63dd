"""The examples run as they stand, on a tiny model and without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.offline.tiny_models import random_text, save_tokenizer, tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK_SECONDS = 400
SIZES = ("--num-samples", "12", "--sequence-length", "24")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "calibration.txt", tmp_path / "held_out.txt"
    for seed, path in enumerate(paths):
        path.write_text(random_text(2000, seed), encoding="utf-8")
    return paths


def environment() -> dict[str, str]:
    """The commands of this environment first, and no network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def test_quickstart(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "sparse"
    arguments = [model, *texts, output, "--method", "wanda+cp", *SIZES]
    done = subprocess.run(
        [EXAMPLES / "quickstart.sh", *map(str, arguments)],
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "valid, checksums agree" in done.stdout
    assert '"perplexity"' in done.stdout
    assert done.stdout.endswith(
        f"Serve it with the line that its model card has: {output}/README.md\n"
    )
    assert "vllm serve" in (output / "README.md").read_text(encoding="utf-8")


def test_quickstart_says_how_it_is_used() -> None:
    done = subprocess.run(
        [EXAMPLES / "quickstart.sh", "model"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "MODEL CALIBRATION_TEXT HELD_OUT_TEXT OUTPUT" in done.stderr


@pytest.mark.serving
def test_the_notebook_runs(
    model: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    settings = {
        "MODEL": str(model),
        "CALIBRATION": str(texts[0]),
        "HELD_OUT": str(texts[1]),
        "OUTPUT": str(tmp_path / "sparse"),
        "SIZES": " ".join(SIZES),
        "TEXT": "--sequence-length 64 --max-windows 8",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM is imported once
        "TORCHDYNAMO_DISABLE": "1",  # and compiles none of its helpers
    }
    for name, value in (environment() | settings).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "compress_and_serve.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook,
        timeout=NOTEBOOK_SECONDS,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    shown = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "valid, checksums agree" in shown
    assert "relative error" in shown
    assert shown.count('"perplexity"') == 2


def test_the_notebook_is_committed_without_output() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.read(EXAMPLES / "compress_and_serve.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
