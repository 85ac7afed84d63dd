"""Every way of waiting has its processes and its turns, alone and beside a busy program."""

import os
from pathlib import Path

import psutil
import pytest

from benchmarks import waiting
from benchmarks.cpu.waiting_tables import waits
from benchmarks.records.rows import Rows
from benchmarks.waiting import KEY, POLICY, SPINS, THREADS, WAYS, Gradients, measure, run
from tests.offline.tiny_models import tiny_llama


class Pretended:
    """Takes as many seconds as turns were asked for; remembers the variables of its beginning."""

    turns = 0
    begun: tuple[tuple[str | None, ...], ...] = ()
    closed = 0
    programs: tuple[int, ...] = ()

    def __init__(self) -> None:
        variables = tuple(os.environ.get(name) for name in (SPINS, POLICY, THREADS))
        Pretended.begun = (*Pretended.begun, variables)

    def seconds(self) -> float:
        Pretended.turns += 1
        Pretended.programs = (*Pretended.programs, len(psutil.Process().children()))
        return float(Pretended.turns)

    def close(self) -> None:
        Pretended.closed += 1


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"turns": 0, "begun": (), "closed": 0, "programs": ()}.items():
        monkeypatch.setattr(Pretended, name, value)


def test_ways_take_turns_after_a_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POLICY, "active")
    monkeypatch.setenv(THREADS, "7")
    others = len(psutil.Process().children())
    rows = measure("decoding", Pretended, 3)
    assert Pretended.begun == (
        (None, None, None),
        ("5000", None, None),
        ("500", None, None),
        (None, "passive", None),
        (None, None, "1"),
    )
    assert (os.environ[POLICY], os.environ[THREADS], Pretended.closed) == ("active", "7", len(WAYS))
    ways = len(WAYS)
    assert [seen - others for seen in Pretended.programs] == 4 * (ways * [0] + ways * [1])
    assert len(psutil.Process().children()) == others
    first, *_ = [row for row in rows if not row["beside"]]
    assert (first["way"], first["seconds"], first["repeats"]) == ("as by default", 21.0, 3)
    assert (first["fastest"], first["slowest"]) == (11.0, 31.0)
    assert [row["seconds"] for row in rows if row["beside"]] == [26.0, 27.0, 28.0, 29.0, 30.0]


def test_a_work_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Path, lambda _: Pretended()
    monkeypatch.setattr(waiting, "WORKS", dict.fromkeys(waiting.WORKS, work))
    for works, turns in ((["decoding"], 20), (["decoding"], 20), (list(waiting.WORKS), 40)):
        rows = Rows(tmp_path / "result.json", {"cores": 2}, KEY)
        run(rows, works, 1)
        assert Pretended.turns == turns
    header, _, *lines = waits({"rows": rows.all()}).splitlines()
    assert header.count("|") == 6
    assert len(lines) == len(WAYS)
    assert lines[0].split(" | ")[3:] == ["0.1", "0.1 |"]  # tokens in a second
    assert lines[1].startswith(f"| `{SPINS}=5000` | 3")


def test_a_table_of_one_work_leaves_the_other_out() -> None:
    rows = [row | {"work": "gradients"} for row in measure("gradients", Pretended, 1)]
    assert waits({"rows": rows}).splitlines()[2] == "| as by default | 11.0 | 16.0 |  |  |"


def test_a_step_of_gradients_takes_time(tmp_path: Path) -> None:
    tiny_llama(max_position_embeddings=waiting.GRADIENT_TOKENS).save_pretrained(tmp_path)
    work = Gradients(tmp_path)
    try:
        assert work.seconds() > 0
    finally:
        work.close()
