"""Latent attention on CPUs, whose values vLLM multiplies slowly."""

from torch import Tensor
from torch.nn import Module


def store_values_by_head(model: Module) -> None:
    """Lay out what makes values of latent vectors head by head, in a model that is loaded.

    vLLM 0.32 leaves `W_UV` [heads, rank, channels] a view of `kv_b_proj` in which the rank comes
    last, whose product with few tokens takes PyTorch four times as long.
    """
    for module in model.modules():
        weight = getattr(module, "W_UV", None)
        if isinstance(weight, Tensor) and weight.device.type == "cpu":
            weight.data = weight.data.contiguous()
