"""The processes of one prune, as ``torchrun`` starts them: each takes a share of every step.

All hold the whole model; what the optimiser of distillation holds is shared out. What is computed
without gradients is computed by the first process alone and given to the others, so that all decide
alike to the last bit; only the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed

from permllm_offline.errors import OfflineError
from permllm_offline.run.steps import Step, Work, metadata_of, step_at

Result = TypeVar("Result")

PATIENCE = timedelta(days=2)
"""For which the others wait while the first process measures the dense model."""


def first() -> bool:
    """Whether this is the process that writes; a rank among one process says nothing."""
    return _started() == 1 or int(os.environ.get("RANK", "0")) == 0


def _started() -> int:
    """Processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_count() -> int:
    """Processes that share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def count() -> int:
    """Processes that work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Work with the other processes that ``torchrun`` has started, if it did, in the context.

    A process group that is there already is used, and left as it is; it must take tensors of the
    CPU, as numbers and states are there.

    Args:
        device: of each process; of ``cuda``, each takes a GPU of its own.

    Raises:
        OfflineError: one GPU for all, more processes than GPUs, or a group without the CPU.
    """
    if distributed.is_initialized():
        _check_cpu_backend()
    if _started() == 1 or distributed.is_initialized():
        yield
        return
    _take_device(device)
    distributed.init_process_group(timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _check_cpu_backend() -> None:
    """Raise OfflineError where the process group that is there sends no tensors of the CPU."""
    backends = distributed.get_backend_config()
    if "cpu" not in (pair.partition(":")[0] for pair in backends.split(",")):
        raise OfflineError(
            f"the process group that is there has the backends {backends!r}, and none for the CPU, "
            'on which numbers and states are exchanged: make it with backend="cpu:gloo,cuda:nccl", '
            "or leave it to the prune."
        )


def _take_device(device: str) -> None:
    """Make ``cuda`` mean the GPU of this process."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    if index:
        raise OfflineError(
            f"--device {device} is one GPU, and torchrun started several processes: give --device "
            "cuda, with which each takes one of its own."
        )
    mine, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if mine >= gpus:
        raise OfflineError(
            f"process {mine} of this machine finds {gpus} GPUs, and each process takes one of its "
            "own: start no more processes than GPUs, or give --device cpu."
        )
    torch.cuda.set_device(mine)


def from_first(compute: Callable[[], Result]) -> Result:
    """Return on every process what ``compute`` returns on the first."""
    if count() == 1:
        return compute()
    found = [compute() if first() else None]
    distributed.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def share(batch: Tensor) -> Tensor:
    """The part of a batch that this process takes; the parts of all are the batch."""
    return batch[rank() :: count()]


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def owners(sizes: Sequence[int]) -> list[int]:
    """The process that takes each of some things, so that all have about as much.

    Args:
        sizes: of each, bytes say.
    """
    result = [0] * len(sizes)
    for turn, index in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        result[index] = turn % count()
    return result


def spread(tensor: Tensor, owner: int) -> None:
    """Give every process the contents that one process has, in place."""
    if count() > 1:
        distributed.broadcast(tensor, owner)


def collected(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the first process the tensors of all, whose names differ; on the others none."""
    if count() == 1:
        return dict(tensors)
    known: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{}] * count()
    distributed.all_gather_object(known, {k: (t.shape, t.dtype) for k, t in tensors.items()})
    if not first():
        for tensor in tensors.values():
            distributed.send(tensor.detach().cpu().contiguous(), 0)
        return {}
    found = dict(tensors)
    for sender, theirs in enumerate(known[1:], start=1):
        for name, (shape, dtype) in theirs.items():
            found[name] = torch.empty(shape, dtype=dtype)
            distributed.recv(found[name], sender)
    return found


def summed(value: float) -> float:
    """Sum of a number over all processes."""
    return value if count() == 1 else float(total(torch.tensor(value, dtype=torch.float64)))


def total(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if count() > 1:
        distributed.all_reduce(tensor)
    return tensor


class SharedWork(Work):
    """The steps of several processes: the first keeps them, and all have what it has.

    Args:
        kept: the work of the first process; None on the others.
    """

    def __init__(self, kept: Work | None) -> None:
        super().__init__()
        self._kept = kept or Work()
        self.costs = self._kept.costs

    def measured(self, name: str) -> AbstractContextManager[None]:
        """Count what this process does in the context as a step that is never kept."""
        return self._kept.measured(name)

    def step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return the result of a step that the first process alone computes."""
        return from_first(lambda: self._kept.step(name, compute).on_cpu())

    def common_step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return the result of a step that all processes compute together."""
        if from_first(lambda: self._kept.finished(name)):
            return self.step(name, compute)
        return self._kept.step(name, compute)

    def interval(self, name: str) -> Step | None:
        """Return the state in which the first process last kept the step of that name, or None.

        Where all find its file, each reads what it asks for: no process needs all of a large one.
        """
        kept = self._kept.interval(name) if first() else None  # checked, or nothing is kept
        path = from_first(lambda: self._kept.interval_file(name))
        if path is None:
            return None
        told = from_first(lambda: metadata_of(path))
        found = _the_same(path, told)
        if summed(float(found is None)) == 0:
            return found
        return from_first(lambda: kept and kept.on_cpu())

    def keep_interval(self, name: str, state: Step) -> None:
        """Keep the state of an unfinished step on the first process."""
        self._kept.keep_interval(name, state)


def _the_same(path: Path, told: Mapping[str, str]) -> Step | None:
    """The step of a file that says of itself what another process was told; None for others."""
    try:
        return step_at(path) if metadata_of(path) == told else None
    except (OSError, OfflineError):
        return None
