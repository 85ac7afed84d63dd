"""The option ``--json``: a file for the result, beside what a command prints."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_offline.run.local_path import local_path


def add_json_option(parser: argparse.ArgumentParser, content: str) -> None:
    """Add the option; ``content`` is what the file will hold."""
    parser.add_argument("--json", type=local_path, metavar="OUT", help=f"write {content} to a file")


def check_json(file: Path | None) -> None:
    """Check before any work that the result can be written.

    Raises:
        OfflineError: it cannot.
    """
    if file is None:
        return
    place = file if file.exists() else file.parent
    reason = None
    if file.is_dir():
        reason = "it is a folder"
    elif not place.exists():
        reason = f"there is no folder {place}"
    elif place != file and not place.is_dir():
        reason = f"{place} is no folder"
    elif not os.access(place, os.W_OK):
        reason = f"{place} may not be written"
    if reason is not None:
        raise OfflineError(
            f"--json {file} cannot be written ({reason}): give a file in a folder that is there."
        )


def write_json(file: Path | None, record: Any) -> None:
    """Write the result where asked: after it was shown, so that no failure loses it."""
    if file is not None:
        file.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
