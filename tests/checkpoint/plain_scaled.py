"""Weights of 8 bits in plain Python: what their bytes mean, and how to choose them.

Nothing here shares code with what is tested: float8 is decoded by its definition, products are
rounded by `struct` and by bits.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Matrix = list[list[float]]


def decode_e4m3(byte: int) -> float:
    """OCP 8-bit floating point, E4M3: no infinities, and one bit pattern of NaN for each sign."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 0xF, byte & 0x7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def decode_int8(byte: int) -> float:
    return float(byte - 256 if byte > 127 else byte)


DECODERS: dict[torch.dtype, Callable[[int], float]] = {
    torch.float8_e4m3fn: decode_e4m3,
    torch.int8: decode_int8,
}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def packed(integers: Tensor, bits: int) -> Tensor:
    """Integers [out, in] without their sign in int32 [out, in * bits / 32], the first lowest."""
    each, words = 32 // bits, []
    for line in integers.tolist():
        numbers = [number + 2 ** (bits - 1) for number in line]
        parts = (numbers[start : start + each] for start in range(0, len(line), each))
        words.append([sum(one << bits * at for at, one in enumerate(part)) for part in parts])
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def float32(number: float) -> float:
    """Round a double to the nearest float32, ties to even."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def bfloat16(number: float) -> float:
    """Round a float32 to the nearest bfloat16, ties to even."""
    bits = struct.unpack("I", struct.pack("f", number))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(struct.unpack("f", struct.pack("I", bits & 0xFFFF0000))[0])


def restored(stored: Tensor, scale: Matrix, rows: int, columns: int) -> Tensor:
    """The products of a matrix of 8 bits [out, in] and its scales, in bfloat16."""
    decode = DECODERS[stored.dtype]
    found = []
    for i, line in enumerate(stored.view(torch.uint8).tolist()):
        found.append(
            [
                bfloat16(float32(decode(byte) * scale[i // rows][j // columns]))
                for j, byte in enumerate(line)
            ]
        )
    return torch.tensor(found, dtype=torch.float32).to(torch.bfloat16)


def quantized(
    weight: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float8_e4m3fn,
    bits: int = 8,
) -> tuple[Tensor, Matrix]:
    """The nearest codes of a matrix [out, in], each block scaled to the largest: [out, in].

    Integers may have fewer bits than int8.
    """
    values = weight.double().tolist()
    codes = sorted((DECODERS[dtype](code), code) for code in range(256) if code not in (0x7F, 0xFF))
    most = LARGEST[dtype]
    if dtype == torch.int8:
        most = 2.0 ** (bits - 1) - 1
        codes = [(float(number), number % 256) for number in range(-int(most), int(most) + 1)]
    numbers = [number for number, _ in codes]
    out, width = weight.shape
    scale = [[0.0] * -(-width // columns) for _ in range(-(-out // rows))]
    for i, line in enumerate(values):
        for j, number in enumerate(line):
            largest = float32(abs(number) / most)
            scale[i // rows][j // columns] = max(scale[i // rows][j // columns], largest)
    found = []
    for i, line in enumerate(values):
        factors = [factor or 1.0 for factor in scale[i // rows]]
        found.append(
            [codes[nearest(numbers, x / factors[j // columns])][1] for j, x in enumerate(line)]
        )
    return torch.tensor(found, dtype=torch.uint8).view(dtype), scale


def nearest(numbers: Sequence[float], number: float) -> int:
    """Where in an ascending list the number lies that is nearest."""
    at = min(bisect_left(numbers, number), len(numbers) - 1)
    before = max(at - 1, 0)
    return before if number - numbers[before] < numbers[at] - number else at
