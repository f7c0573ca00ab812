"""What the examples measure with: batch norms as training leaves them, errors, times, and memory."""

import statistics
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def randomize_batchnorms(net: nn.Module) -> None:
    """Draw statistics and affines: a fresh batch norm is close to the identity, and a wrong fold of it goes unseen."""
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def median_seconds(nets: Sequence[nn.Module], x: Tensor, rounds: int = 11) -> list[float]:
    """Median time of each net's forward; the nets take turns, so that a slow moment of the machine hits them alike."""
    times: list[list[float]] = [[] for _ in nets]
    for _ in range(rounds + 1):
        for net, taken in zip(nets, times, strict=True):
            start = time.perf_counter()
            net(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]  # the first round warms up


def peak_bytes(net: nn.Module, x: Tensor) -> int:
    """Peak of the memory that a forward takes on top of weights and input.

    On CUDA the allocator's own count, workspaces of kernels included; on a CPU the tensors that are alive at once.
    """
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        net(x)
        return torch.cuda.max_memory_allocated() - held
    with _LiveTensors() as live:
        net(x)
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Sees every op, and adds up the storages that ops made and that nobody has freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for storage in (tensor.untyped_storage() for tensor in _tensors(out)):
            address = storage.data_ptr()
            if address in given or address in self.alive:  # a view, or written in place
                continue
            self.alive[address] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, address)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
