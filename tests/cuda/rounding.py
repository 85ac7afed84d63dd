"""How far a product may be from the exact one: by its own rounding, and that of sums in float32."""

import torch
from torch import Tensor

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 6e-4}  # the rounding of y gives most of it
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place
ENOUGH = 64  # results over which roundings average out: of one alone, its own may be the error
SUMS = 2**-14  # of sums in float32, of the sum of all magnitudes
SMALLEST = 2**-24  # of float16


def assert_right(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Compare y with the product of x and a dense weight in float64."""
    exact = x.double() @ dense.t()
    if bias is not None:
        exact = exact + bias.double()
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert y.isfinite().all()
    if y.numel() >= ENOUGH:
        error = (y.double() - exact).norm() / exact.norm().clamp_min(1e-30)
        assert error < TOLERANCE[x.dtype], f"relative Frobenius error {error:.2e}"
    size = x.double().abs() @ dense.abs().t()
    bound = ROUNDING[x.dtype] * exact.abs() + SUMS * size + SMALLEST
    assert ((y.double() - exact).abs() <= bound).all()
