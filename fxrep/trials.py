"""What a collapse really saves: both sides are run, on random numbers of their sizes, and timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxrep.fold import AVERAGE, empty_layer, pad_arguments, pad_mode
from fxrep.lower import Emit, needs_explicit_pad
from fxrep.pricing import Job
from fxrep.stopwatch import Call, take_turns

ROUNDS, BUDGET = 15, 0.5  # of one trial, whichever is over first

Key = tuple[object, ...]


class Trials:
    """Times jobs against jobs on a device; what is alike is timed once."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.known: dict[tuple[Key, Key], float | None] = {}

    def __call__(self, before: Sequence[Job], after: Sequence[Job]) -> float | None:
        """Seconds saved; None where the difference is within the spread of single turns."""
        key = _key(before), _key(after)
        if key not in self.known:
            self.known[key] = self._saved(before, after)
        return self.known[key]

    @torch.no_grad()
    def _saved(self, before: Sequence[Job], after: Sequence[Job]) -> float | None:
        calls = [self._call(jobs) for jobs in (before, after)]
        apart, whole = take_turns(calls, ROUNDS, self.device, BUDGET)
        ratio = whole.to(apart)
        return None if abs(ratio.median - 1) <= ratio.spread else apart.median * (1 - ratio.median)

    def _call(self, jobs: Sequence[Job]) -> Call:
        steps = [self._job(job) for job in jobs]

        def call() -> None:
            for step in steps:
                step()

        return call

    def _job(self, job: Job) -> Callable[[], Tensor]:
        """The terms of each part, their sum, and the concatenation of the parts."""
        parts = [[self._term(emit, job) for emit in part] for part in job.recipe.parts]
        axis = -(job.recipe.dims or 0) - 1

        def run() -> Tensor:
            sums = []
            for terms in parts:
                total = terms[0]()
                for term in terms[1:]:
                    total = total + term()
                sums.append(total)
            return sums[0] if len(sums) == 1 else torch.cat(sums, axis)

        return run

    def _term(self, emit: Emit, job: Job) -> Callable[[], Tensor]:
        dims, rows = job.recipe.dims or 0, emit.anchor.rows
        x = self._drawn(job.read[emit.anchor.source])
        apply = self._scale(emit, dims) if emit.operator is None or emit.is_pad else self._layer(emit)
        if rows is None:
            return lambda: apply(x)
        if emit.anchor.is_slice:
            return lambda: apply(x.narrow(-dims - 1, rows[0], len(rows)))
        index = torch.tensor(rows, device=self.device)
        return lambda: apply(x.index_select(-dims - 1, index))

    def _scale(self, emit: Emit, dims: int) -> Callable[[Tensor], Tensor]:
        if emit.is_pass:
            return lambda x: x
        if emit.operator is not None:
            return _padding(emit)
        gain, bias = (
            None if k is None else self._drawn((*k.shape, *((1,) * dims if k.shape else ())))
            for k in (emit.gain, emit.bias)
        )
        if gain is not None and bias is not None:
            return lambda x: torch.addcmul(bias, x, gain)
        factor = gain if gain is not None else bias
        assert factor is not None
        return (lambda x: x + factor) if gain is None else (lambda x: x * factor)

    def _layer(self, emit: Emit) -> Callable[[Tensor], Tensor]:
        assert emit.operator is not None
        op = emit.operator
        if emit.is_pool:
            return lambda x: AVERAGE[op.dims](x, op.taps, op.stride, op.pad_lo)
        layer = empty_layer(emit.operator).to_empty(device=self.device).to(self.dtype).eval()
        for parameter in layer.parameters():
            parameter.copy_(self._drawn(tuple(parameter.shape)))
        if not needs_explicit_pad(emit.operator):
            return layer
        pad = _padding(emit)
        return lambda x: layer(pad(x))

    def _drawn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)


def _padding(emit: Emit) -> Callable[[Tensor], Tensor]:
    assert emit.operator is not None
    pads, mode = pad_arguments(emit.operator), pad_mode(emit.operator)
    return lambda x: F.pad(x, pads, mode)


def _key(jobs: Sequence[Job]) -> Key:
    return tuple((job.recipe.describe(), job.result, *sorted(job.read.values())) for job in jobs)
