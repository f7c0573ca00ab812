"""What an operator costs: a roofline over shapes, `max(MACs / peak, bytes / bandwidth) + launch`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from fxrep.errors import FxrepError

UNSURE = 0.25  # relative: what predictions of a collapse are off by, by docs/benchmarks.md
BYTES = 4  # per element: float32; only ratios matter


#: Kinds of kernel, each with a peak of its own.
KINDS = ("dense", "pointwise", "depthwise", "grouped", "linear")
OBJECTIVES = ("latency", "macs", "params")


@dataclass(frozen=True)
class Profile:
    """What a device does: multiply-adds per second by kind of kernel, bytes per second, seconds to start an op.

    `measured` says that they were measured on the very device that it is for.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    launch: float
    measured: bool = False
    #: seconds to make a view, which computes nothing
    view: float = 0.0


#: Orders of magnitude, for choices and not for predictions. `cpu`: two cores of a server in eager mode. `cuda`: below
#: the published peak figures of data-centre GPUs (A100, H100) by what kernels usually lose; not measured.
PROFILES: Mapping[str, Profile] = MappingProxyType({
    "cpu": Profile(
        "cpu", {"dense": 5e10, "pointwise": 4e10, "depthwise": 8e9, "grouped": 1.5e10, "linear": 3e10}, 1.2e10, 1.2e-5
    ),
    "cuda": Profile(
        "cuda", {"dense": 5e13, "pointwise": 3e13, "depthwise": 2e12, "grouped": 6e12, "linear": 3e13}, 2e12, 6e-6
    ),
})  # fmt: skip


def profile_for(device_type: str) -> Profile:
    """The shipped profile for a torch device type; an accelerator without its own is taken for a GPU."""
    return PROFILES["cpu"] if device_type in ("cpu", "meta") else PROFILES["cuda"]


class Work(NamedTuple):
    """What a step does: multiply-adds of one kind, elements moved, operators started."""

    macs: float = 0.0
    kind: str = "dense"
    elements: float = 0.0
    steps: int = 0
    weights: float = 0.0

    def seconds(self, profile: Profile) -> float:
        """The roofline of this step on a device.

        >>> Work(macs=5e10, steps=1).seconds(PROFILES["cpu"])
        1.000012
        """
        compute = self.macs / profile.peak[self.kind]
        memory = BYTES * (self.elements + self.weights) / profile.bandwidth
        return max(compute, memory) + self.steps * profile.launch


@dataclass(frozen=True)
class Aim:
    """What a plan makes least: the predicted time on a device, the multiply-adds, or the weights."""

    profile: Profile
    objective: str = "latency"
    #: seconds saved by what is measured, of jobs before and jobs after; None where the clock cannot tell either
    trial: Callable[[Sequence[Any], Sequence[Any]], float | None] | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise FxrepError(f"there is no objective {self.objective!r}; there are {', '.join(OBJECTIVES)}")

    def cost(self, work: Work) -> float:
        """In seconds, multiply-adds or weights.

        >>> Aim(PROFILES["cpu"], "macs").cost(Work(macs=5e10, steps=1))
        50000000000.0
        """
        if self.objective == "latency":
            return work.seconds(self.profile)
        return work.macs if self.objective == "macs" else work.weights

    def is_unsure(self, saved: float, cost: float) -> bool:
        """Whether the prediction is too close to decide, where it may be tried."""
        return self.trial is not None and abs(saved) < UNSURE * cost

    def told(self, whole: float, apart: float) -> str:
        """That one cost is more than the other, in words."""
        if self.objective == "latency":
            return f"it is predicted to take {duration(whole)}, apart {duration(apart)}"
        unit = {"macs": "multiply-adds", "params": "weights"}[self.objective]
        return f"it would have {whole:.4g} {unit}, apart {apart:.4g}"


def kind_of(taps: int, dims: int, groups: int, in_channels: int) -> str:
    """Which peak a convolution can reach.

    >>> kind_of(9, 2, 1, 64), kind_of(9, 2, 64, 64), kind_of(1, 0, 1, 64)
    ('dense', 'depthwise', 'linear')
    """
    if dims == 0:
        return "linear"
    if groups == 1:
        return "pointwise" if taps == 1 else "dense"
    return "depthwise" if groups == in_channels else "grouped"


def duration(seconds: float) -> str:
    """Three digits and a unit: 1.2e-05 -> '12.0 µs'."""
    unit, size = next(((u, s) for u, s in _UNITS if abs(seconds) >= s), _UNITS[-1])
    value = seconds / size
    return f"{value:.{_decimals(value)}f} {unit}"


_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def _decimals(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
