"""Whether a contestant multiplies by the weight that it was given: nothing wrong is timed."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest error of a contestant by the values of its weight. Rounding the result to bfloat16 gives
#: 0.0017, rounding inputs and weight to int8 as well about 0.012.
LIMITS = {"bfloat16": 0.01, "float32": 0.01, "int8": 0.05}
OUTPUTS = 512
"""So many outputs are looked at, evenly over all of them."""


class WrongProduct(ValueError):
    """A contestant is further from the exact product than its limit."""


def activations(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The same random `[m, k]` in every process."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


class Exact:
    """The float64 product of inputs with a dense weight `[out, in]`, some of its outputs."""

    def __init__(self, x: Tensor, dense: Tensor):
        self._outputs = slice(None, None, max(1, dense.shape[0] // OUTPUTS))
        self._product = x.double() @ dense[self._outputs].double().t()

    def relative_error(self, y: Tensor) -> float:
        """Frobenius error of a result `[m, out]` over the norm of the exact one."""
        difference = y[:, self._outputs].double() - self._product
        return float(difference.norm() / self._product.norm())

    def require(self, name: str, y: Tensor, limit: float) -> float:
        """The relative error of a contestant's result.

        Raises:
            WrongProduct: it is above the limit, or is no number.
        """
        error = self.relative_error(y)
        if not error <= limit:
            raise WrongProduct(
                f"{name} is not timed: its product of {len(y)} tokens is {error:.3g} from the "
                f"exact one, relative, and may be {limit:g} from it: mend the contestant"
            )
        return error
