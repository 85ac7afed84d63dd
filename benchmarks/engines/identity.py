"""Which checkpoint a result is of: its name, and a digest of what tells its weights."""

import hashlib
from pathlib import Path

from permllm_vllm.checkpoint.checksums import CHECKSUMS_NAME


def identity(checkpoint: Path) -> dict[str, str]:
    """Name and digest of a checkpoint; weights are not read.

    The digest is of `SHA256SUMS`, else of the configuration and of all names and sizes.
    """
    sums = checkpoint / CHECKSUMS_NAME
    if sums.exists():
        told = sums.read_bytes()
    else:
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        sizes = [f"{path.relative_to(checkpoint)} {path.stat().st_size}\n" for path in files]
        told = (checkpoint / "config.json").read_bytes() + "".join(sizes).encode()
    return {"name": checkpoint.resolve().name, "digest": hashlib.sha256(told).hexdigest()}
