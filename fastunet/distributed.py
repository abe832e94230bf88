"""Several processes, one run: what each does of it, and what they tell each other.

Without a process group all of this is about one process. ``torchrun`` starts several; PyTorch's
DistributedDataParallel then adds up their gradients, by gloo on the CPU and by NCCL on GPUs.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import pick_device

T = TypeVar("T")

# what gloo, NCCL and their store say when a process at the other end is gone
_LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|TCPStore|timed out", re.I
)


class ProcessLostError(ConnectionError):
    """Another process of the run has ended, so that this one cannot go on."""


@contextmanager
def joined(device: str = "auto") -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started beside this one, if it did.

    Args:
        device: as ``pick_device`` takes it; among several processes "auto" and "cuda" are the GPU
            of this process's number on its machine.
    Returns: the device to train on.
    Raises: ValueError if this machine has no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield pick_device(device)
        return
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    target = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else device)
    if target.type == "cuda":
        # gathered objects travel by the current device
        torch.cuda.set_device(target)
    dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield target
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; the first one writes and reports."""
    return dist.get_rank() if _grouped() else 0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if _grouped() else 1


def share(batch: int, parts: int = 1) -> slice:
    """The samples of a batch that are this process's, to be gone through in ``parts``.

    Raises: ValueError if ``batch`` cannot be divided evenly.
    """
    if batch % (count() * parts):
        raise ValueError(
            f"train: batch must divide evenly by processes x accumulate, {count()} x {parts}, "
            f"got {batch} tiles"
        )
    size = batch // count()
    return slice(rank() * size, (rank() + 1) * size)


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def agreed(received: Sequence[int], device: torch.device) -> int | None:
    """The signal that any process has received, or None, the same in all."""
    number = received[0] if received else 0
    if count() > 1:
        numbers = torch.tensor(number, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        number = int(numbers)
    return number or None


def gather(mine: Sequence[T], total: int) -> list[T]:
    """All ``total`` values in order, where each process has every ``count()``-th from its rank."""
    if count() == 1:
        return list(mine)
    lists: list[Sequence[T]] = [()] * count()
    dist.all_gather_object(lists, mine)
    return [lists[i % count()][i // count()] for i in range(total)]


def agree(work: Callable[[], T]) -> T:
    """``work()`` in each process; an error in any of them is raised by all."""
    if count() == 1:
        return work()
    result, mine = None, None
    try:
        result = work()
    except Exception as error:
        mine = error
    errors: list[Exception | None] = [None] * count()
    dist.all_gather_object(errors, mine)
    first = next((error for error in errors if error is not None), None)
    if first is None:
        return cast("T", result)
    raise first from mine


def from_first(work: Callable[[], T]) -> T:
    """What ``work()`` gives in the first process, told to all; so is an error."""
    result = agree(lambda: work() if rank() == 0 else None)
    told = [result]
    if count() > 1:
        dist.broadcast_object_list(told, 0)
    return cast("T", told[0])


def dealt(work: Callable[[int], T], total: int) -> list[T]:
    """``work(i)`` for each i below ``total``, dealt out; all results in order, in each process."""
    mine = agree(lambda: [work(i) for i in range(rank(), total, count())])
    return gather(mine, total)


@contextmanager
def naming_the_lost(
    command: str = "train", advice: str = "continue from the last checkpoint with --resume"
) -> Iterator[None]:
    """Raise ProcessLostError where a collective failed because a process had ended."""
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not _LOST.search(str(error)):
            raise
        raise ProcessLostError(
            f"{command}: another of the {count()} processes has ended; {advice}"
        ) from error


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
