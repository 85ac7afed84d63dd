"""What pruning may gain in time on this machine, matrix by matrix, from recorded measurements."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_offline.forecast.outline import ServedShape
from permllm_vllm import forecast
from permllm_vllm.forecast import Forecast, Measurement

TOKENS = (1, 4, 16, 64, 256)
BENCHMARK = "python -m benchmarks.kernels --device cpu --threads 1 --json FILE"


@dataclass(frozen=True)
class ShapeSpeed:
    """Forecasts for one matrix, by the number of tokens that the model takes at once.

    An expert multiplies those of them that come to it.
    """

    shape: ServedShape
    forecasts: Mapping[int, Forecast]


@dataclass(frozen=True)
class Speed:
    """Forecasts for the pruned matrices of a model; without any, ``reason`` says why.

    ``pattern`` is what was measured: another than the model's where that has no record. ``note``
    says what else is another.
    """

    source: str
    shapes: Sequence[ShapeSpeed]
    pattern: str = ""
    reason: str = ""
    note: str = ""

    def whole(self) -> dict[int, float]:
        """Dense time over sparse time of all pruned matrices together, by tokens.

        Of experts those count that any token comes to.
        """
        if not self.shapes:
            return {}

        def total(m: int, times: Iterable[float]) -> float:
            busy = (one.shape.count * _busy(m, one.shape.share) for one in self.shapes)
            return sum(map(operator.mul, busy, times))

        return {
            m: total(m, (one.forecasts[m].dense_us for one in self.shapes))
            / total(m, (one.forecasts[m].sparse_us for one in self.shapes))
            for m in TOKENS
        }

    def whole_inside(self) -> dict[int, bool]:
        """Whether no part of `whole` is extrapolated, by tokens."""
        if not self.shapes:
            return {}
        return {m: all(one.forecasts[m].inside for one in self.shapes) for m in TOKENS}

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, for JSON."""
        return asdict(self) | {"whole": self.whole(), "whole_inside": self.whole_inside()}


def expected_speed(
    shapes: Sequence[ServedShape], pattern: str, value_dtype: str, measured: Path | None = None
) -> Speed:
    """Forecast the pruned matrices of a model on one thread of this machine.

    Args:
        shapes: the matrices as an engine multiplies them.
        pattern: of the kept values; where it was not measured, ``Speed.pattern`` is another.
        value_dtype: of the kept values.
        measured: a result of ``benchmarks.kernels``; without it, the one that the package carries
            for the pattern and the instruction set that would serve here, `PERMLLM_CPU_ISA` first.

    Raises:
        OfflineError: ``measured`` holds no usable rows.
    """
    if measured is not None:
        try:
            measurement = Measurement.read(measured, pattern)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise OfflineError(
                f"{measured} is no result of {BENCHMARK}: {error}. Measure with that command, and "
                "give its file."
            ) from error
    else:
        isa = forecast.served_instruction_set()
        packaged = forecast.packaged(isa, pattern)
        if packaged is None:
            named = (
                f", which {forecast.OVERRIDE} names," if os.environ.get(forecast.OVERRIDE) else ""
            )
            found = f"of {isa}{named} is" if isa else "fits this CPU and is"
            return Speed("", [], reason=f"no measurement {found} packaged: {_remedy()}")
        measurement = packaged
    speeds = []
    for shape in shapes:
        forecasts = {
            m: measurement.forecast(shape.n, shape.k, _tokens_of_one(m, shape.share), value_dtype)
            for m in TOKENS
        }
        known = {m: one for m, one in forecasts.items() if one is not None}
        if len(known) < len(TOKENS):
            reason = f"{measurement.source} measured no {value_dtype} values: {_remedy()}"
            return Speed(measurement.source, [], measurement.pattern, reason)
        speeds.append(ShapeSpeed(shape, known))
    return Speed(measurement.source, speeds, measurement.pattern)


def _busy(m: int, share: float) -> float:
    """Which part of matrices that each get a share of ``m`` tokens gets any, by chance."""
    return 1 - (1 - share) ** m


def _tokens_of_one(m: int, share: float) -> int:
    """How many of ``m`` tokens come to one of those that get any, in the mean."""
    return round(m * share / _busy(m, share))


def _remedy() -> str:
    return f"measure this machine with `{BENCHMARK}` and give the file as --measured FILE"
