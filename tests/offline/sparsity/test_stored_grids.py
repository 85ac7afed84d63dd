import torch

from permllm_offline.sparsity.rounded_layer import RoundedLayer
from permllm_offline.sparsity.stored_grids import grid_tensors, grids_of

LAYERS = 12


def layer(index: int) -> RoundedLayer:
    """One of integers without more, then one of int4 values, then one of smoothed inputs."""
    return RoundedLayer(
        {"attn.q": torch.tensor([index + 0.5, 2.0]), "mlp:0": torch.tensor([float(index)])},
        {"attn.q": index / 7, "mlp:0": 0.0},
        {"attn.q": torch.tensor([[index, 16]], dtype=torch.uint8)} if index % 3 == 1 else {},
        {"qkv": torch.tensor([index, -1], dtype=torch.int8)} if index % 3 == 2 else {},
    )


def same(one: RoundedLayer, two: RoundedLayer) -> bool:
    pairs = zip(
        (one.scales, one.multipliers, one.exponents),
        (two.scales, two.multipliers, two.exponents),
        strict=True,
    )
    return one.errors == two.errors and all(
        mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
        for mine, other in pairs
    )


def test_grids_come_back_in_the_order_of_their_layers() -> None:
    """Whatever the order of a file's names, and whatever else it holds."""
    layers = [layer(index) for index in range(LAYERS)]
    tensors = {"norm:3:scale": torch.ones(1)} | dict(sorted(grid_tensors(layers).items()))
    found = grids_of(tensors, [one.errors for one in layers])
    assert len(found) == LAYERS
    assert all(map(same, found, layers))
    assert not same(found[1], layers[2])


def test_no_layers_have_no_tensors() -> None:
    assert grid_tensors([]) == {}
    assert grids_of({}, []) == []
