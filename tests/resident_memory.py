"""Growth of this process's resident memory, of which Linux keeps the peak."""

from pathlib import Path

from permllm_vllm.quantization.served import release_freed_memory

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
NOW, PEAK = "VmRSS", "VmHWM"


class ResidentGrowth:
    """How much more memory than at its making this process has held at most since then.

    Memory that was freed before is given back to the system first, and the peak begins anew: what
    was held earlier neither hides growth nor counts.
    """

    def __init__(self) -> None:
        release_freed_memory()  # or tensors would lie where earlier ones did, and show no growth
        self._watched = _reset_peak()
        self._before = _bytes(NOW) if self._watched else 0

    def peak_bytes(self) -> int | None:
        """None where the system does not let a process reset its peak."""
        return _bytes(PEAK) - self._before if self._watched else None


def _reset_peak() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _bytes(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) << 10
