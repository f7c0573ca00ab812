"""Calls timed side by side: they take turns, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[], Any]

SHORTEST = 2e-3  # seconds; a shorter call is repeated within its turn until the clock's own error is small
LEAST = 5  # rounds that are made however long they take


@dataclass(frozen=True)
class Times:
    """Seconds per call, one number a turn."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Half of the interquartile range.

        >>> Times((1.0, 2.0, 3.0, 4.0, 5.0)).spread
        1.0
        """
        if len(self.samples) < 2:
            return 0.0
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2

    def to(self, other: Times) -> Times:
        """The ratio to another's time in the same turn: what slows down a whole turn cancels.

        >>> Times((2.0, 4.0)).to(Times((1.0, 2.0))).samples
        (2.0, 2.0)
        """
        return Times(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))


def synchronize(device: torch.device) -> None:
    """Waits for what was started on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds of one of `repeats` calls in a row; on CUDA between two events, without the host's waiting."""
    if device.type == "cuda":
        return _between_events(call, repeats, device)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def _between_events(call: Call, repeats: int, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats


def repeats_of(call: Call, device: torch.device, shortest: float = SHORTEST) -> int:
    """Warms up, and tells how many calls in a row fill a turn."""
    call()
    once = min(seconds(call, 1, device) for _ in range(3))
    return max(1, round(shortest / max(once, 1e-9)))


def turns(
    calls: Sequence[Call], rounds: int, device: torch.device, budget: float = inf, shortest: float = SHORTEST
) -> Iterator[list[float]]:
    """The seconds of each call, round by round, until there were `rounds`, or LEAST and `budget` seconds are over.

    Every second round goes backwards, so that no call always follows the same other one.
    """
    repeats = [repeats_of(call, device, shortest) for call in calls]
    end = time.monotonic() + budget
    for turn in range(rounds):
        if turn >= LEAST and time.monotonic() > end:
            return
        taken = [0.0] * len(calls)
        for i in range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls))):
            taken[i] = seconds(calls[i], repeats[i], device)
        yield taken


def take_turns(calls: Sequence[Call], rounds: int, device: torch.device, budget: float = inf) -> list[Times]:
    """Times of each call over all rounds."""
    rows = list(turns(calls, rounds, device, budget))
    return [Times(samples) for samples in zip(*rows, strict=True)]


@contextmanager
def threads(number: int | None) -> Iterator[int]:
    """Torch's threads meanwhile; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)
