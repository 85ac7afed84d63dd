"""Two processes give what one gives."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from permllm_offline.api import prune
from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.pipeline import check_processes, shared_out
from permllm_offline.preparation.recipe_input import make_recipe, read_recipe
from permllm_offline.reconstruction.kept_weights import KeptWeights
from permllm_offline.run import processes
from permllm_offline.run.steps import Step, WorkFolder
from tests.robustness.children import CONTEXT

LEARNING = {"steps": 3, "windows_per_step": 2, "windows_at_once": 1, "validation_interval": 2}
DISTILLATION = {"steps": 3, "windows_per_step": 2, "self_windows": 2, "validation_interval": 2}
OPTIONS: dict[str, Any] = {
    "method": "permllm-wanda",
    "pattern": "2:4",
    "reconstruction": "obs+distillation",
    "values": "int4",
    "num_samples": 10,
    "sequence_length": 20,
    "evaluation_windows": 2,
    "learning": LEARNING,
    "distillation": DISTILLATION,
}


def run_two(target: Callable[..., object], *arguments: object) -> None:
    """Run a function that can be pickled in two processes that know each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [CONTEXT.Process(target=as_rank, args=(r, port, target, arguments)) for r in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]


def as_rank(
    rank: int, port: int, target: Callable[..., object], arguments: Sequence[object]
) -> None:
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in known.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    target(*arguments)


def prune_to(output: Path, model: Path, text: Path) -> Any:
    return prune(model, output, dataset=text, **OPTIONS)


def test_two_processes_give_what_one_gives(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    one, two = tmp_path / "one" / "sparse", tmp_path / "two" / "sparse"
    run_two(prune_to, two, tiny_model_directory, text_file)
    report = prune_to(one, tiny_model_directory, text_file)
    assert len(report.learning_curve) == len(report.reconstruction_curve) == 4
    assert [path.name for path in two.parent.iterdir()] == ["sparse"]
    # A step adds the gradients of two windows, in one process or over two: the same sum.
    for file in ("model.safetensors", "recipe.yaml"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    mine, theirs = (json.loads((folder / "report.json").read_text()) for folder in (one, two))
    for curve in ("learning_curve", "reconstruction_curve"):
        # Validation adds its windows in another order.
        for entry, other in zip(mine.pop(curve), theirs.pop(curve), strict=True):
            assert entry == pytest.approx(other, rel=1e-12)
    assert mine == theirs


def test_processes_that_cannot_share_are_refused(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("permllm_offline.pipeline.count", lambda: 3)

    def prune_by(**options: Any) -> None:
        prune(tiny_model_directory, tmp_path / "sparse", dataset=text_file, **OPTIONS | options)

    with pytest.raises(OfflineError, match=r"3 processes cannot share 2 windows .* of learning"):
        prune_by()
    with pytest.raises(OfflineError, match=r"give the recipe a distillation\.windows_per_step"):
        prune_by(method="wanda")
    with pytest.raises(OfflineError, match="start it without torchrun"):
        prune_by(method="wanda", reconstruction="obs")
    assert not (tmp_path / "sparse").exists()


def prune_and_stop(output: Path, model: Path, text: Path) -> None:
    """Prune until the first state of distillation is kept, then lose the process, killed."""
    kept = processes.SharedWork.keep_interval

    def killed(self: processes.SharedWork, name: str, state: Any) -> None:
        kept(self, name, state)
        if name == "distillation":
            os._exit(0)

    processes.SharedWork.keep_interval = killed  # type: ignore[method-assign]
    prune_to(output, model, text)


def test_a_shared_distillation_is_resumed_by_one_process_or_two(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    whole, by_one, by_two = (tmp_path / name / "sparse" for name in ("whole", "one", "two"))
    for output in (whole, by_one):
        output.parent.mkdir()
    run_two(prune_and_stop, by_one, tiny_model_directory, text_file)
    assert not by_one.exists()
    shutil.copytree(by_one.parent, by_two.parent)
    prune_to(whole, tiny_model_directory, text_file)
    prune_to(by_one, tiny_model_directory, text_file)
    run_two(prune_to, by_two, tiny_model_directory, text_file)
    assert not (by_two.parent / ".sparse.work").exists()
    for resumed in (by_one, by_two):
        for file in ("model.safetensors", "recipe.yaml"):
            assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file


def share_out() -> None:
    with processes.joined():
        torch.manual_seed(0)
        linears = [nn.Linear(8, rows, bias=False).requires_grad_(False) for rows in (2, 9, 5, 4)]
        masks = [
            torch.full((linear.out_features, 1), 0b00110101, dtype=torch.uint8)
            for linear in linears
        ]
        kept_channels = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0])
        with KeptWeights(linears, masks, shared=True) as kept:
            # The largest of all and the third, the second and the smallest.
            mine = {int(name.partition(".")[0]) for name in kept.state()}
            assert mine == ({1, 3} if processes.first() else {0, 2})
            kept.remember()
            for index, linear in enumerate(linears):
                if index > 0 or not processes.first():  # the other process reaches it
                    linear.weight.sum().backward()
            kept.step(0.5)
            moved = [linear.weight.clone() for linear in linears]
            state = {k: t.clone() for k, t in processes.collected(kept.state()).items()}
            assert len(state) == (20 if processes.first() else 0)
            kept.recall()
            for linear, weight in zip(linears, moved, strict=True):
                torch.testing.assert_close(linear.weight, weight + 0.5 * kept_channels)
            kept.load_state(processes.from_first(lambda: state))
            for linear, weight in zip(linears, moved, strict=True):
                assert torch.equal(linear.weight, weight)
            linears[1].weight.sum().backward()
            kept.step(0.5)  # what no process reaches takes none
            stayed = [
                torch.equal(linear.weight, weight)
                for linear, weight in zip(linears, moved, strict=True)
            ]
            assert stayed == [True, False, True, True]


def test_each_process_moves_its_own_weights_and_has_those_of_all() -> None:
    run_two(share_out)


def read_interval(folder: Path, other: str) -> None:
    """Read what the first process kept; the second finds the same, nothing or another file."""
    handed_over = []
    on_cpu = Step.on_cpu
    with processes.joined(), pytest.MonkeyPatch.context() as patch:
        kept = WorkFolder(folder, "a") if processes.first() else None
        patch.setattr(Step, "on_cpu", lambda step: handed_over.append(step) or on_cpu(step))
        if not processes.first():
            path = processes.metadata_of
            patch.setattr(processes, "metadata_of", lambda _: path(folder / other))
        work = processes.SharedWork(kept)
        assert work.interval("other") is None
        found = work.interval("one")
        assert found is not None
        assert found.facts == {"loss": 0.5}
        assert found.tensors["x"].tolist() == [1, 1, 1]
        assert len(handed_over) == (other != "one-interval.safetensors" and processes.first())


@pytest.mark.parametrize("other", ["one-interval", "two", "../damaged", "none"])
def test_each_process_reads_for_itself_what_was_kept(tmp_path: Path, other: str) -> None:
    with WorkFolder(tmp_path / "work", "a") as work:
        work.begin()
        work.keep_interval("one", Step({"x": torch.ones(3)}, {"loss": 0.5}))
        work.step("two", lambda: Step({"x": torch.zeros(3)}, {"loss": 0.5}))
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    run_two(read_interval, tmp_path / "work", f"{other}.safetensors")


def add() -> None:
    with processes.joined():
        assert processes.total(torch.full((2,), 1.5, dtype=torch.bfloat16)).tolist() == [3, 3]
        assert processes.summed(2.5) == 5
        parts = processes.share(torch.arange(5)).tolist()
        assert parts == ([0, 2, 4] if processes.first() else [1, 3])
        assert processes.from_first(lambda: os.getpid()) == os.getpid() or not processes.first()


def test_sums_and_parts_of_two_processes() -> None:
    run_two(add)


@pytest.mark.parametrize(("size", "expected"), [(None, True), ("1", True), ("2", False)])
def test_a_rank_says_nothing_of_a_process_that_is_alone(
    size: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert processes.first() == expected


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int) -> list[object]:
    """Pretend to be one of two processes on a machine; returns what is set and initialised."""
    done: list[object] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    group = processes.distributed
    monkeypatch.setattr(group, "init_process_group", lambda **_: done.append("joined"))
    monkeypatch.setattr(group, "destroy_process_group", lambda: done.append("left"))
    return done


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda", [1, "joined", "left"]), ("cpu", ["joined", "left"])]
)
def test_only_cuda_without_an_index_takes_the_gpu_of_the_process(
    device: str, expected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = gpus(monkeypatch, count=2, local_rank=1)
    with processes.joined(device):
        pass
    assert done == expected


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:0", "--device cuda:0 is one GPU, and torchrun started several processes"),
        ("cuda", "process 2 of this machine finds 2 GPUs"),
    ],
)
def test_processes_without_a_gpu_of_their_own_are_refused(
    device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = gpus(monkeypatch, count=2, local_rank=2)
    with pytest.raises(OfflineError, match=message), processes.joined(device):
        pass
    assert done == []


def test_each_process_takes_one_window_of_distillation_where_none_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe({"model": "m"})
    assert shared_out(recipe) == recipe
    monkeypatch.setattr("permllm_offline.pipeline.count", lambda: 3)
    assert shared_out(recipe).distillation.windows_per_step == 3
    check_processes(shared_out(recipe))
    for entries in ({"distillation": {"windows_per_step": 1}}, {"method": "wanda"}):
        given = make_recipe({"model": "m"} | entries)
        assert shared_out(given) == given


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_processes_are_checked_before_the_model_is_opened(
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("permllm_offline.pipeline.count", lambda: 3)
    line = ["prune", "nowhere", "--output", str(tmp_path / "sparse"), "--method", "wanda", *more]
    assert main(line) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def prune_best_to(output: Path, model: Path, text: Path) -> None:
    constants = {name: OPTIONS["distillation"][name] for name in ("steps", "self_windows")}
    sizes = {"num_samples": 10, "sequence_length": 20, "evaluation_windows": 2}
    prune(model, output, dataset=text, method="permllm-best", distillation=constants, **sizes)


def test_the_default_method_is_shared_and_the_recipe_says_how(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    run_two(prune_best_to, tmp_path / "sparse", tiny_model_directory, text_file)
    recorded = read_recipe(tmp_path / "sparse" / "recipe.yaml")
    assert recorded["distillation"]["windows_per_step"] == 2


@pytest.mark.parametrize(
    ("backends", "usable"), [("cpu:gloo,cuda:nccl", True), ("cuda:nccl", False)]
)
def test_a_group_that_is_there_must_send_tensors_of_the_cpu(
    backends: str, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.distributed, "get_backend_config", lambda: backends)
    entered = []
    refused = nullcontext() if usable else pytest.raises(OfflineError, match="none for the CPU")
    with refused, processes.joined():
        entered.append(backends)
    assert entered == [backends] * usable
