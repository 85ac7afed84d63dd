"""The committed records reach what the kernels, and models served with them, are to reach."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines.serving_rows import DENSE, INT8

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TOKENS = (1, 4, 16, 64, 256)
SHAPES = {(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)}
"""Outputs and inputs of the fused linear layers of Llama-2-7B."""
AVX512 = {"bfloat16": (2.4, 1.4, 1.0, 0.97, 0.97), "int8": (3.5, 2.2, 1.8, 1.8, 1.8)}
NO_SLOWER_AT_ALL = (1.0, 1.0, 1.0, 1.0, 1.0)
LEAST = {
    "avx2": {"bfloat16": NO_SLOWER_AT_ALL, "int8": NO_SLOWER_AT_ALL},
    "avx512_bf16": AVX512,
    "zen5": AVX512,
    "amx": {"bfloat16": (2.2, 2.2, 2.0, 1.9, 1.7), "int8": (3.8, 3.6, 3.4, 2.5, 2.2)},
}
"""Times as fast as the fastest dense peer of the activations' dtype on one thread, at `TOKENS`."""
MISSED: Mapping[str, set[Any]] = {
    "kernels-cpu-amx": {
        ("2:4", (4096, 11008), "bfloat16", 256),
        ("2:4", (4096, 4096), "bfloat16", 64),  # 1.82, in an hour in which L3 was slow; before 2.03
        ("2:4", (4096, 4096), "int8", 4),  # 3.57; before 4.22
    },
    "kernels-cpu-amx-4to8": {
        ("4:8", (4096, 11008), "bfloat16", 256),
        ("4:8", (4096, 4096), "bfloat16", 256),  # 1.699
    },
    # With one token dense reads almost as fast as sparse there, on Zen 4 at about half the rate.
    "kernels-cpu-zen5": {
        ("2:4", (4096, 4096), "int8", 1),
        ("2:4", (4096, 11008), "int8", 1),
    },
    "kernels-cpu-zen5-4to8": {
        ("4:8", (4096, 4096), "bfloat16", 1),
        ("4:8", (4096, 11008), "bfloat16", 1),
        ("4:8", (12288, 4096), "int8", 1),
        ("4:8", (4096, 4096), "int8", 1),
        ("4:8", (4096, 11008), "int8", 1),
    },
    # 2.34 to 2.38 of 2.4 and 3.34 to 3.47 of 3.5, on a day on which dense read faster still;
    # 32:64 expands its bfloat16 rows: 2.08 to 2.31.
    "kernels-cpu-zen5-patterns": {
        ("2:4", (12288, 4096), "bfloat16", 1),
        ("2:4", (4096, 4096), "bfloat16", 1),
        ("2:4", (12288, 4096), "int8", 1),
        ("2:4", (4096, 4096), "int8", 1),
        ("8:16", (12288, 4096), "bfloat16", 1),
        ("8:16", (12288, 4096), "int8", 1),
        ("32:64", (12288, 4096), "bfloat16", 1),
        ("32:64", (4096, 4096), "bfloat16", 1),
        ("32:64", (22016, 4096), "bfloat16", 1),
        ("32:64", (4096, 11008), "bfloat16", 1),
        ("32:64", (4096, 11008), "int8", 1),
    },
}
"""All that records miss of `LEAST`, by file; the pages of the machines say by how much."""
NO_SLOWER = 0.97
LEAST_SERVED = {
    ("2:4 bfloat16", DENSE): 1.8,
    ("2:4 int8", DENSE): 2.4,
    ("2:4 int8", INT8): 1.4,
}
"""Decoded tokens per second of a variant, times those of another, one sequence."""
MISSED_SERVED = {
    ("zen5", 512): ["2:4 int8 to dense bfloat16"],  # 2.32, on a slow day; before 2.45
}
"""What records miss of these, by machine and prompt."""
MOST_BYTES = {"2:4 bfloat16": 0.6, "2:4 int8": 0.35}
"""Of the bytes of the pruned layers in dense bfloat16, as the engine holds them."""
Record = Mapping[str, Any]


def record(file: Path) -> Record:
    return json.loads(file.read_text())


def one_thread(pattern: str) -> list[Any]:
    """Records that match, of which no row has more threads."""
    files = sorted(RESULTS.glob(pattern))
    return [
        pytest.param(file, id=file.stem)
        for file in files
        if all(row["threads"] == 1 for row in record(file)["rows"])
    ]


def speedups(found: Record) -> dict[tuple[Any, ...], float]:
    """Dense time over sparse by pattern, shape, values and tokens; the fastest peer's.

    That is a peer whose values have the dtype of the activations.
    """
    ratios: dict[tuple[Any, ...], float] = {}
    for row in found["rows"]:
        if row["peer_values"] == found.get("dtype", "bfloat16"):
            key = row["pattern"], (row["n"], row["k"]), row["value_dtype"], row["m"]
            ratio = row["peer_us"] / row["ours_us"]
            ratios[key] = min(ratio, ratios.get(key, ratio))
    return ratios


def short_of(found: Record) -> list[Any]:
    """Keys of `speedups` that are below their target, or that the record should have and lacks."""
    ratios = speedups(found)
    return [
        (pattern, shape, values, m)
        for pattern in {pattern for pattern, *_ in ratios}
        for shape in SHAPES
        for values, targets in LEAST[found["isa"]].items()
        for m, least in zip(TOKENS, targets, strict=True)
        if not ratios.get((pattern, shape, values, m), 0.0) >= least
    ]


@pytest.mark.parametrize("isa", LEAST)
def test_there_is_a_record_of_each_pattern(isa: str) -> None:
    files = [record(file.values[0]) for file in one_thread("kernels-cpu-*.json")]
    rows = [row for found in files if found["isa"] == isa for row in found["rows"]]
    assert {row["pattern"] for row in rows} >= {"2:4", "4:8"}


@pytest.mark.parametrize("file", one_thread("kernels-cpu-*.json"))
def test_kernels_are_as_fast_as_they_are_to_be(file: Path) -> None:
    assert set(short_of(record(file))) == MISSED.get(file.stem, set())


def test_every_excuse_is_of_a_record() -> None:
    assert MISSED.keys() <= {file.id for file in one_thread("kernels-cpu-*.json")}


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=file.stem) for file in sorted(RESULTS.glob("kernels-cpu-*.json"))],
)
def test_no_kernel_is_slower_than_dense(file: Path) -> None:
    """With any number of threads; huge pages for the peers are another comparison."""
    ratios = speedups(record(file))
    kinds = {(shape, values, m) for _, shape, values, m in ratios}
    every = {"bfloat16", "int8"} | {values for _, values, _ in kinds}
    assert kinds == set(itertools.product(SHAPES, every, TOKENS))
    assert {key: ratio for key, ratio in ratios.items() if ratio < NO_SLOWER} == {}


@pytest.mark.parametrize("machine", ["zen4", "zen5", "amx"])
def test_there_is_a_record_of_two_threads(machine: str) -> None:
    rows = record(RESULTS / f"kernels-cpu-{machine}-two-threads.json")["rows"]
    assert {row["threads"] for row in rows} == {2}


def short_of_served(found: Record, prompt: int) -> list[str]:
    """What a serving record misses of its targets, or lacks, with one prompt of so many tokens."""
    rows = {
        row["variant"]: row
        for row in found["rows"]
        if (row["batch"], row["prompt_tokens"]) == (1, prompt)
    }
    missed = []
    for (variant, peer), least in LEAST_SERVED.items():
        speeds = [rows.get(name, {}).get("decode_tokens_per_second") for name in (variant, peer)]
        if None in speeds or not speeds[0] >= least * speeds[1]:
            missed.append(f"{variant} to {peer}")
    for variant, most in MOST_BYTES.items():
        packed, dense = (rows.get(variant, {}).get(f"{kind}_bytes") for kind in ("packed", "dense"))
        if packed is None or not packed <= most * dense:
            missed.append(f"bytes of {variant}")
    return missed


@pytest.mark.parametrize("machine", ["zen4", "zen5", "amx"])
@pytest.mark.parametrize("prompt", [32, 512])
def test_serving_is_as_fast_and_as_small_as_it_is_to_be(machine: str, prompt: int) -> None:
    found = record(RESULTS / f"serving-cpu-{machine}.json")
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    assert shape.items() <= found["shape"].items()
    assert short_of_served(found, prompt) == MISSED_SERVED.get((machine, prompt), [])


@pytest.mark.parametrize(
    ("variant", "change", "missed"),
    [
        ("2:4 int8", {}, []),
        ("2:4 bfloat16", {"decode_tokens_per_second": 17.9}, ["2:4 bfloat16 to dense bfloat16"]),
        (
            "2:4 int8",
            {"decode_tokens_per_second": 23.9},
            ["2:4 int8 to dense bfloat16", "2:4 int8 to vLLM int8 (W8A8)"],
        ),
        ("vLLM int8 (W8A8)", {"batch": 8}, ["2:4 int8 to vLLM int8 (W8A8)"]),
        ("2:4 bfloat16", {"packed_bytes": 61}, ["bytes of 2:4 bfloat16"]),
        ("2:4 int8", {"packed_bytes": None}, ["bytes of 2:4 int8"]),
    ],
)
def test_a_served_variant_below_its_target_is_found(
    variant: str, change: Mapping[str, Any], missed: list[str]
) -> None:
    speeds = {DENSE: 10.0, "2:4 bfloat16": 18.0, "2:4 int8": 24.5, INT8: 17.5}
    packed = {"2:4 bfloat16": 60, "2:4 int8": 35}
    rows = {
        name: {
            "variant": name, "batch": 1, "prompt_tokens": 32,
            "decode_tokens_per_second": speed,
            "packed_bytes": packed.get(name), "dense_bytes": 100,
        }
        for name, speed in speeds.items()
    }  # fmt: skip
    rows[variant] |= change
    assert short_of_served({"rows": list(rows.values())}, 32) == missed


@pytest.mark.parametrize(
    ("isa", "change", "missed"),
    [
        ("avx512_bf16", {}, []),
        ("avx512_bf16", {"ours_us": 101.0}, [("2:4", (4096, 4096), "int8", 1)]),
        ("avx512_bf16", {"threads": 1, "m": 2}, [("2:4", (4096, 4096), "int8", 1)]),
        ("avx512_bf16", {"peer_values": "int8"}, [("2:4", (4096, 4096), "int8", 1)]),
        ("avx2", {"ours_us": 350.0}, []),
        ("avx2", {"ours_us": 351.0}, [("2:4", (4096, 4096), "int8", 1)]),
    ],
)
def test_a_row_below_its_target_is_found(
    isa: str, change: Mapping[str, Any], missed: list[Any]
) -> None:
    rows = [
        {
            "pattern": "2:4", "n": n, "k": k, "m": m, "value_dtype": values,
            "peer_values": "bfloat16", "peer_us": 350.0, "ours_us": 100.0,
        }
        for n, k in SHAPES for values in ("bfloat16", "int8") for m in TOKENS
    ]  # fmt: skip
    place = {"n": 4096, "k": 4096, "value_dtype": "int8", "m": 1}
    (number,) = (i for i, row in enumerate(rows) if place.items() <= row.items())
    rows[number] = {**rows[number], **change}
    assert short_of({"isa": isa, "rows": rows}) == missed
