"""This process among those that torchrun started; without torchrun, it is alone. And what it does when asked to stop."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn


@contextmanager
def asked_to_stop(handler: Callable[[], None]) -> Iterator[None]:
    """Meanwhile SIGINT and SIGTERM call `handler` and do nothing else."""
    before = {number: signal.signal(number, lambda *_: handler()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Processes:
    """`rank` of `count` processes, computing on `device`."""

    def __init__(self, cuda: bool) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.count > 1:
            distributed.init_process_group("nccl" if cuda else "gloo")

    @property
    def first(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model` with its gradients averaged over the processes."""
        return nn.parallel.DistributedDataParallel(model) if self.count > 1 else model

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in the order of ranks."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            distributed.barrier()

    def close(self) -> None:
        """The end of all of them. One that fails just ends: it may be alone in that, and torchrun then ends the others."""
        if self.count > 1:
            distributed.barrier()  # one that leaves while others still talk may abort at its end
            distributed.destroy_process_group()
