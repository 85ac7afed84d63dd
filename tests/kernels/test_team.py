"""Workers of a parallel region go through its phases without waiting for one that never comes."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
SECONDS = 300  # for what takes a moment: it hangs where it fails

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler is installed")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("team") / "team"
    sources = [Path(__file__).with_name("team.cpp"), CSRC / "cpu" / "threads" / "team.cpp"]
    command = [COMPILER, "-std=c++20", "-O1", "-pthread", f"-I{CSRC}", *sources, "-o", program]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        *((how, n) for how in ("together", "in-turn") for n in (1, 2, 5, 300)),
        ("failing", 2),
        ("failing", 5),
    ],
)
def test_every_item_is_worked_on_once_and_in_its_phase(team: Path, how: str, workers: int) -> None:
    done = subprocess.run([team, how, str(workers)], capture_output=True, timeout=SECONDS)
    assert done.stdout == b"finished\n"
