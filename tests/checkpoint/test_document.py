"""`docs/checkpoint-format.md` is parsed: what it shows is what the code does."""

import json
import re
from pathlib import Path

import torch

from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.int4 import pack_int4
from permllm_vllm.checkpoint.packing import pack_mask, pack_values, unpack, unpack_mask
from permllm_vllm.checkpoint.pattern import SUPPORTED, Pattern
from permllm_vllm.checkpoint.permutation import absolute, canonical, local, unpermute_columns

DOCUMENT = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()
BLOCK, PATTERN = 64, Pattern(2, 4)


def fenced(language: str) -> str:
    blocks = re.findall(
        rf"^```{re.escape(language)}\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 1, f"expected one {language!r} block, found {len(blocks)}"
    return blocks[0]


def shown_bytes(tensor: str) -> bytes:
    return bytes.fromhex(fenced(f"hex {tensor}"))


def table(header: str) -> list[list[str]]:
    lines = iter(DOCUMENT.splitlines())
    assert any(line.startswith(header) for line in lines), header
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def numbers(cell: str) -> list[float]:
    return [float(number) for number in cell.replace(",", " ").split()]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def worked_example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the channels [64], permuted weights [1, 64] and mask [1, 64] of the table."""
    rows = table("| group | channels")
    assert [row[0] for row in rows] == [str(group) for group in range(16)]
    channels, weights, kept = (
        [number for row in rows for number in numbers(row[column])] for column in (1, 2, 3)
    )
    return (
        torch.tensor(channels, dtype=torch.int64),
        torch.tensor([weights], dtype=torch.bfloat16),
        torch.tensor([kept]) == 1,
    )


def test_the_worked_example_follows_its_description() -> None:
    channels, weights, _ = worked_example()
    for j, (channel, weight) in enumerate(zip(channels.tolist(), weights[0].tolist(), strict=True)):
        assert channel == j // 4 + 16 * (j % 4)
        assert weight == (channel / 2 if channel % 2 == 0 or channel == 1 else -channel / 2) or (
            channel == 1 and weight == 0
        )
    assert torch.signbit(weights[0])[channels == 1].item()


def test_writing_the_worked_example_gives_the_bytes_shown() -> None:
    channels, weights, mask = worked_example()
    values = pack_values(weights, mask, PATTERN)
    shown_values = [n for row in table("| group | channels") for n in numbers(row[4])]
    assert values.flatten().tolist() == shown_values
    permutation = local(channels, BLOCK)
    assert torch.equal(canonical(permutation, BLOCK, PATTERN), permutation)
    for name, tensor in (
        (schema.WEIGHT_PACKED, values),
        (schema.WEIGHT_MASK, pack_mask(mask)),
        (schema.INPUT_PERMUTATION, permutation),
    ):
        assert tuple(tensor.shape) == schema.tensor_shape(name, 1, 64, PATTERN, "bfloat16")
        assert f"`{name}`, shape {list(tensor.shape)}" in DOCUMENT
        assert as_bytes(tensor) == shown_bytes(name)


def test_reading_the_bytes_shown_gives_the_worked_example() -> None:
    packed = bytearray(shown_bytes(schema.WEIGHT_PACKED))
    values = torch.frombuffer(packed, dtype=torch.bfloat16).view(1, 32)
    packed_mask = torch.frombuffer(bytearray(shown_bytes(schema.WEIGHT_MASK)), dtype=torch.uint8)
    entries = bytearray(shown_bytes(schema.INPUT_PERMUTATION))
    permutation = torch.frombuffer(entries, dtype=torch.uint8)
    channels, weights, mask = worked_example()
    assert torch.equal(absolute(permutation, BLOCK), channels)
    assert torch.equal(unpack_mask(packed_mask.view(1, 8)), mask)
    permuted = unpack(values, packed_mask.view(1, 8))
    assert as_bytes(permuted) == as_bytes(torch.where(mask, weights, torch.zeros_like(weights)))

    dense = unpermute_columns(permuted, permutation, BLOCK)[0].tolist()
    reader: dict[str, object] = {}
    exec(fenced("python"), reader)
    read_row = reader["read_row"]
    assert callable(read_row)
    assert read_row(bytes(packed), shown_bytes(schema.WEIGHT_MASK), bytes(entries), BLOCK) == dense


def test_the_configuration_shown_is_valid_and_its_keys_are_listed() -> None:
    shown = json.loads(fenced("json"))
    assert schema.QuantizationConfig.from_dict(shown).to_dict() == shown
    keys = [row[0].strip("`") for row in table("| key | value |")]
    assert keys == list(schema.QuantizationConfig.model_fields)
    values = {row[0].strip("`"): row[1] for row in table("| key | value |")}
    assert values["block_size"].startswith("{}, {} or {},".format(*schema.BLOCK_SIZES))
    assert re.findall(r"`(\w+)`", values["value_dtype"]) == list(schema.VALUE_DTYPES)
    assert re.findall(r"`(\d+:\d+)`", values["pattern"]) == list(SUPPORTED)


def test_the_tensors_listed_have_the_shapes_and_dtypes_of_the_schema() -> None:
    rows = {
        row[0].strip("`").removeprefix("L."): row for row in table("| tensor | shape | dtype |")
    }
    of_int4 = {
        row[0].strip("`").removeprefix("L."): row for row in table("| tensor of int4 values |")
    }
    assert {*rows, *of_int4} == {*schema.SPARSE_KINDS, schema.BIAS}
    assert of_int4.keys() <= set(schema.value_kinds("int4"))
    sizes = {"out": 24, "in": 72, "in * N / M": 36, "in / 8": 9}
    sizes |= {"in * N / M / 2": 18, "ceil(in / 64)": 2}
    for value_dtype, torch_dtype in schema.VALUE_DTYPES.items():
        for kind, (_, shape, dtype, _) in (
            rows if value_dtype != "int4" else rows | of_int4
        ).items():
            expected = tuple(sizes[size.strip()] for size in shape.strip("[]").split(","))
            assert schema.tensor_shape(kind, 24, 72, PATTERN, value_dtype) == expected
            found = schema.tensor_dtype(kind, value_dtype)
            if dtype == "value dtype":
                assert found == torch_dtype
            elif kind == schema.BIAS:
                assert found is None
            else:
                assert str(found) == f"torch.{dtype}"


def test_the_int4_values_described_are_the_bytes_shown() -> None:
    values = torch.tensor([[-24, 21, 0, 9]], dtype=torch.int8)
    assert "the values -24, 21, 0 and 9" in DOCUMENT
    packed = pack_int4(values, torch.tensor([[3]], dtype=torch.uint8))
    assert as_bytes(packed) == shown_bytes("int4")
