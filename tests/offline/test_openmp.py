"""Threads of the command sleep soon where they wait, and its environment is asked first."""

import os
import subprocess
import sys

import pytest

from permllm_offline.openmp import CHOICES, let_threads_sleep


@pytest.mark.parametrize("chosen", CHOICES)
def test_what_the_environment_says_stays(chosen: str) -> None:
    environment = {chosen: "as it is", "OTHER": "too"}
    let_threads_sleep(environment)
    assert environment == {chosen: "as it is", "OTHER": "too"}


def test_the_runtime_has_read_it_when_the_command_begins() -> None:
    """GNU's runtime tells what it has read when it is loaded, and torch's is no other on Linux."""
    program = "import sys; sys.argv = ['permllm-offline', '--version']; "
    program += "from permllm_offline.__main__ import main; main()"
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch has another OpenMP runtime here")
    assert "GOMP_SPINCOUNT = '5000'" in done.stderr
