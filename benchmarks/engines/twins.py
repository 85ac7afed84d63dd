"""Checkpoints that are made of a dense one and lie beside it, as long as that is the same."""

import json
import shutil
from pathlib import Path

from benchmarks.engines.identity import identity


def is_twin(twin: Path, dense: Path) -> bool:
    """Whether a checkpoint is there, and was made of this dense one and not of an earlier one."""
    record = _record(twin)
    if not (twin / "config.json").exists() or not record.exists():
        return False
    return bool(json.loads(record.read_text(encoding="utf-8")) == identity(dense))


def forget(twin: Path) -> None:
    """Remove a checkpoint that is another's twin or half made."""
    _record(twin).unlink(missing_ok=True)
    shutil.rmtree(twin, ignore_errors=True)


def name_parent(twin: Path, dense: Path) -> None:
    """Write down of which dense checkpoint a finished one was made."""
    _record(twin).write_text(json.dumps(identity(dense)) + "\n", encoding="utf-8")


def _record(twin: Path) -> Path:
    """Beside it: what is inside is served, and is all that it is told by."""
    return twin.with_name(f"{twin.name}.parent.json")
