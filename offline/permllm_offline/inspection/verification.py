"""Is a permllm checkpoint whole: every file as it was written, every rule of the format kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.checksums import CHECKSUMS_NAME, checksum_problems
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_weight_map
from permllm_vllm.checkpoint.validation import Problem, validate


@dataclass(frozen=True)
class Verification:
    """What was verified and what is wrong; ``checksums`` tells whether any are recorded."""

    directory: str
    files: int
    bytes: int
    checksums: bool
    problems: Sequence[Problem]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, for JSON."""
        return asdict(self) | {"valid": not self.problems}

    def lines(self) -> list[str]:
        """One line for each problem, then the verdict."""
        files = f"{self.files} weight file{'' if self.files == 1 else 's'}"
        what = f"{self.directory}: {files}, {self.bytes / 1e6:,.1f} MB"
        recorded = "checksums agree" if self.checksums else "no checksums are recorded"
        if self.problems:
            recorded = "" if self.checksums else f", {recorded}"
            count = len(self.problems)
            verdict = f"{count} problem{'s' if count > 1 else ''} found{recorded}"
        else:
            verdict = f"valid, {recorded}"
        return [*map(str, self.problems), f"{what}: {verdict}"]


def verify(directory: Path) -> Verification:
    """Read every byte of a checkpoint and hold it against its checksums and the format.

    Args:
        directory: the checkpoint. One without ``SHA256SUMS``, as older versions wrote it, is
            verified against the format alone.

    Raises:
        OfflineError: there is no ``config.json``, so nothing to verify.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise OfflineError(f"{directory} holds no config.json: give a folder with a checkpoint.")
    try:
        files = sorted(set(read_weight_map(directory).values()))
    except CheckpointError:  # validate says why
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    paths = [directory / file for file in files if (directory / file).is_file()]
    size = sum(path.stat().st_size for path in paths)
    recorded = (directory / CHECKSUMS_NAME).exists()
    problems: list[Problem] = []
    if recorded:
        with tqdm(total=size, unit="B", unit_scale=True, desc="checksums", disable=None) as bar:
            problems += checksum_problems(directory, files, bar.update)
    problems += [problem for problem in validate(directory, _shown) if problem not in problems]
    return Verification(str(directory), len(paths), size, recorded, problems)


def _shown(layers: list[str]) -> Iterable[str]:
    return tqdm(layers, desc="layers", disable=None)
