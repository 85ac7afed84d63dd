"""Kernels that a benchmark forces, and which of them are refused."""

import pytest

from tests.cuda.emulated import A100, H100, L4
from tests.cuda.test_kernel_choice import B200


@pytest.mark.parametrize(
    ("text", "tokens", "forced"),
    [
        ("few_tokens", 128, ("few_tokens", 256, 4)),  # as planned
        ("few_tokens:128", 8, ("few_tokens", 128, 8)),
        ("few_tokens:192", 100, ("few_tokens", 192, 3)),
        ("few_tokens:256:2", 100, ("few_tokens", 256, 2)),
        ("few_tokens:128:1", 4096, ("few_tokens", 128, 1)),
        ("many_tokens_mma", 1, ("many_tokens_mma", 0, 0)),
        ("many_tokens_mma:64", 100, ("many_tokens_mma", 64, 0)),
        ("many_tokens_sm90:256", 1, ("many_tokens_sm90", 256, 0)),
        ("many_tokens_sm90_permuting:32", 4096, ("many_tokens_sm90_permuting", 32, 0)),
    ],
)
def test_what_is_forced_is_taken(emulator, text, tokens, forced):
    assert emulator.force(text, 4096, 4096, tokens, gpu=H100, built="sm90") == forced


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cublas", "it names none of the kernels few_tokens, many_tokens_mma, many_tokens_sm90, "),
        (":64", "it names none of the kernels"),
        ("few_tokens:", "give few_tokens, few_tokens:ROWS or few_tokens:ROWS:SPLITS"),
        ("few_tokens:128:2:1", "give few_tokens, "),
        ("few_tokens:64", "it has no tile of 64"),
        ("few_tokens:0", "it has no tile of 0"),
        ("few_tokens:128:0", "splits are from 1 to 16"),
        ("few_tokens:128:17", "splits are from 1 to 16"),
        ("few_tokens:-1", "give few_tokens, "),
        ("few_tokens:99999999999", "give few_tokens, "),
        ("many_tokens_mma:128:1", "give many_tokens_mma or many_tokens_mma:TILE"),
        ("many_tokens_mma:256", "it has no tile of 256"),
        ("many_tokens_sm90:32", "it has no tile of 32"),
        ("many_tokens_sm90_permuting:128", "it has no tile of 128"),
        ("many_tokens_sm100:128x", "give many_tokens_sm100 or many_tokens_sm100:TILE"),
    ],
)
def test_what_names_no_kernel_is_refused(emulator, text, reason):
    found = emulator.force(text, 4096, 4096, 100, gpu=H100, built="sm90")
    assert isinstance(found, str)
    assert found.startswith(reason)


@pytest.mark.parametrize(
    ("text", "gpu", "options", "reason"),
    [
        ("few_tokens:192", H100, {"tokens": 32}, "for more than 32 tokens"),
        ("few_tokens:256", L4, {}, "its blocks find no room"),
        ("few_tokens:128:15", H100, {}, "of so many splits the last would have nothing"),
        ("few_tokens:128:2", H100, {"tokens": 65536}, "too many tokens"),
        ("many_tokens_mma:128", L4, {}, "its blocks find no room"),
        ("many_tokens_sm90", A100, {}, "this GPU or this build lacks it"),
        ("many_tokens_sm90", H100, {"built": ""}, "this GPU or this build lacks it"),
        ("many_tokens_sm90", H100, {"int8": True}, "it has int8 values"),
        ("many_tokens_sm90", H100, {"rows": 4100}, "outputs that are no multiple of 8"),
        ("many_tokens_sm90_permuting", H100, {"permuted": False}, "it has no permutation"),
        ("many_tokens_sm90_permuting", B200, {}, "this GPU or this build lacks it"),
        ("many_tokens_sm100", H100, {}, "this GPU or this build lacks it"),
    ],
)
def test_what_does_not_fit_a_product_is_refused(emulator, text, gpu, options, reason):
    options = {"rows": 4096, "inputs": 4096, "tokens": 100, "built": "sm90 sm100", **options}
    assert reason in emulator.force(text, gpu=gpu, **options)


@pytest.mark.parametrize(("gpu", "int8"), [(L4, True), (H100, False), (A100, True)])
def test_the_larger_tile_of_mma_is_taken_where_it_finds_room(emulator, gpu, int8):
    found = emulator.force("many_tokens_mma:128", 4096, 4096, 100, gpu=gpu, int8=int8)
    assert found == ("many_tokens_mma", 128, 0)
