"""Which code a measurement is of, where a commit would not say: it may not be committed yet."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "offline" / "permllm_offline", ROOT / "permllm_vllm")


def sources_digest(packages: Sequence[Path] = PACKAGES) -> str:
    """SHA-256 over the names and contents of all modules of some packages."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(package.parent)} {content}\n".encode())
    return digest.hexdigest()
