from permllm_offline.model.sparse_bytes import sparse_bytes
from permllm_vllm.checkpoint.pattern import Pattern


def test_integers_take_scales_and_multipliers_with_them() -> None:
    # 24 rows: 32 kept values of a byte, a mask of 8 bytes, a scale of 4; 64 bytes of permutation.
    assert sparse_bytes(24, 64, Pattern(2, 4), "int8", permuted=True) == 24 * (32 + 8 + 4) + 64
    assert sparse_bytes(24, 64, Pattern(4, 8), "int8", permuted=False) == 24 * (32 + 8 + 4)
    assert sparse_bytes(24, 64, Pattern(2, 4), "bfloat16", permuted=False) == 24 * (64 + 8)
    # 16 bytes for as many values, and a multiplier.
    assert sparse_bytes(24, 64, Pattern(2, 4), "int4", permuted=False) == 24 * (16 + 1 + 8 + 4)
