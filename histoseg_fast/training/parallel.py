"""Several processes, each with a device of its own, under torchrun: the batch is split and the gradients summed.

torchrun --nproc-per-node 2 -m histoseg_fast train DATA --out RUN
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

Item = TypeVar("Item")


class Processes:
    """This process among those that torchrun started; one alone where it did not.

    rank : 0 to count - 1; only rank 0 writes files and talks. device : this process's own.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def share(self, items: list[Item]) -> list[Item]:
        """This process's part of `items`; the parts of all are disjoint and complete."""
        return items[self.rank :: self.count]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes, one transfer for the whole network."""
        if self.count == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        for parameter, grad, part in zip(trained, grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            parameter.grad = torch.empty_like(grad).copy_(part.view_as(grad))  # in the layout it had

    def mean_buffers(self, module: torch.nn.Module) -> None:
        """Make the floating-point buffers of `module` (running statistics) the mean over all processes."""
        for buffer in module.buffers() if self.count > 1 else ():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.count

    def sum(self, values: np.ndarray) -> np.ndarray:
        """`values` (any shape, int64 or float64) added up over all processes."""
        if self.count == 1:
            return values
        tensor = torch.from_numpy(np.array(values)).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, rows: np.ndarray, total: int) -> np.ndarray:
        """The rows of all processes, `total` of them, in the order of the items that `share` took apart."""
        whole = np.zeros((total, *rows.shape[1:]), rows.dtype)
        whole[self.rank :: self.count] = rows
        return self.sum(whole)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()
