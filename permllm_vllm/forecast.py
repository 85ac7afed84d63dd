"""What the CPU kernels can be expected to gain on a layer, from recorded measurements.

Imports no kernel, no torch and no vLLM: `permllm-offline plan` calls it before any work. A
measurement is a result of `python -m benchmarks.kernels --device cpu --json FILE`; the package
carries one per instruction set and pattern, in permllm_vllm/measured.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

_MEASURED = Path(__file__).with_name("measured")
_CPUINFO = Path("/proc/cpuinfo")
OVERRIDE = "PERMLLM_CPU_ISA"

#: Flags in /proc/cpuinfo that an instruction set of the kernels needs, fastest first.
_FLAGS = {
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": {"avx512_bf16", "avx512_vnni", "avx512_vbmi2", "avx512bw", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2"},
}
_FASTER_THAN_AVX2 = {"avx512f", "avx_vnni"}
"""What other instruction sets need, which are not measured."""


@dataclass(frozen=True)
class Forecast:
    """The expected time of one linear layer, dense in bfloat16 and sparse.

    Attributes:
        dense_us, sparse_us: microseconds on one thread, dense with the faster of PyTorch and vLLM.
        ratio: dense_us / sparse_us, above 1 where sparse is faster.
        inside: False where the shape or token count is outside of what was measured.
        source: the processor, the instruction set and the date of the measurement.
    """

    dense_us: float
    sparse_us: float
    ratio: float
    inside: bool
    source: str


@dataclass(frozen=True)
class Measurement:
    """Times of dense and sparse layers of one pattern on one machine, for both value dtypes."""

    source: str
    pattern: str
    times: dict[str, dict[tuple[int, int], dict[int, tuple[float, float]]]]

    @classmethod
    def read(cls, path: Path | str, pattern: str) -> Measurement:
        """Reads the rows of one thread of a result of `benchmarks.kernels`.

        Where none has this pattern, those of another: `pattern` of the measurement says which.

        Raises:
            ValueError: the file holds no rows of one thread.
        """
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            row
            for row in result.get("rows", [])
            if row["threads"] == 1 and row["peer_values"] == "bfloat16"
        ]
        if not rows:
            raise ValueError(
                f"{path} holds no rows of one thread: write it with "
                "python -m benchmarks.kernels --device cpu --threads 1 --json FILE"
            )
        patterns = [row["pattern"] for row in rows]
        found = pattern if pattern in patterns else patterns[0]
        times: dict[str, dict[tuple[int, int], dict[int, tuple[float, float]]]] = {}
        for row in rows:
            if row["pattern"] != found:
                continue
            shape = times.setdefault(row["value_dtype"], {}).setdefault((row["n"], row["k"]), {})
            dense, _ = shape.get(row["m"], (math.inf, 0.0))
            shape[row["m"]] = min(dense, row["peer_us"]), row["ours_us"]
        made = (result["machine"]["cpu"], result.get("isa"), result["date"])
        return cls(", ".join(part for part in made if part), found, times)

    def forecast(self, n: int, k: int, m: int, value_dtype: str) -> Forecast | None:
        """What to expect of a layer of `n` outputs and `k` inputs with `m` tokens.

        Times per weight are interpolated, in the logarithms of `m`, `n` and `k`; a shape weighs by
        the inverse square of its distance. None where this value dtype was not measured.
        """
        shapes = self.times.get(value_dtype)
        if not shapes:
            return None
        tokens = {count for shape in shapes.values() for count in shape}
        weights = {
            shape: 1 / (_distance(shape, (n, k)) ** 2 + 1e-6)
            for shape in shapes  # a measured shape outweighs all others
        }
        total = sum(weights.values())

        def time(which: int) -> float:
            logarithm = sum(
                weight
                * _interpolate(m, {c: pair[which] / (s[0] * s[1]) for c, pair in shapes[s].items()})
                for s, weight in weights.items()
            )
            return n * k * math.exp(logarithm / total)

        dense, sparse = time(0), time(1)
        sizes = [rows * columns for rows, columns in shapes]
        inside = min(tokens) <= m <= max(tokens) and min(sizes) / 2 <= n * k <= max(sizes) * 2
        return Forecast(dense, sparse, dense / sparse, inside, self.source)


def forecast(n: int, k: int, m: int, value_dtype: str, pattern: str) -> Forecast | None:
    """What to expect on this machine's instruction set; see `packaged`, `Measurement.forecast`.

    None where no measurement of it is packaged: `python -m benchmarks.kernels` makes one.
    """
    measurement = packaged(served_instruction_set(), pattern)
    return None if measurement is None else measurement.forecast(n, k, m, value_dtype)


def packaged(isa: str, pattern: str) -> Measurement | None:
    """The measurement of an instruction set that this package carries, or None.

    Where there is none of this pattern, that of another: its `pattern` says which.
    """
    wanted = _MEASURED / f"{isa}-{pattern.replace(':', 'to')}.json"
    found = [file for file in (wanted, *sorted(_MEASURED.glob(f"{isa}-*.json"))) if file.exists()]
    return Measurement.read(found[0], pattern) if found else None


def served_instruction_set() -> str:
    """What `PERMLLM_CPU_ISA` names, as the kernels read it; without it, `instruction_set`."""
    return os.environ.get(OVERRIDE) or instruction_set()


def instruction_set(cpuinfo: Path = _CPUINFO) -> str:
    """The fastest instruction set of the kernels that this CPU runs, of those worth measuring.

    An empty string where it runs none; what an override or the operating system forbids does not
    count.
    """
    if not cpuinfo.exists():
        return ""
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    found = next((name for name, needed in _FLAGS.items() if needed <= flags), "")
    if found == "avx2" and flags & _FASTER_THAN_AVX2:
        return ""
    zen5 = fields.get("vendor_id") == "AuthenticAMD" and int(fields.get("cpu family", 0)) >= 26
    return "zen5" if found == "avx512_bf16" and zen5 else found


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    return math.hypot(math.log2(a[0] / b[0]), math.log2(a[1] / b[1]))


def _interpolate(m: int, times: dict[int, float]) -> float:
    """Logarithm of the time at `m`; above what is known proportional to it, below it constant."""
    known = sorted(times)
    after = next((count for count in known if count >= m), None)
    if after == m:
        return math.log(times[m])
    if after is None:
        return math.log(times[known[-1]] * m / known[-1])
    if after == known[0]:
        return math.log(times[after])
    before = max(count for count in known if count < m)
    share = math.log(m / before) / math.log(after / before)
    return (1 - share) * math.log(times[before]) + share * math.log(times[after])
