"""What a verification found, and how it prints. Measures nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

SCHEMA = 1
"""Version of `Verdict.to_dict`: raised when a key goes or changes its meaning, not when one is added."""

BLIND = 1e-4
ALL_AGREE = "in float64 all layers agree"
KERNEL_ZEROS = (
    "An element that is not finite reaches more outputs of the collapsed model: an identity or 1x1 branch that became\n"
    "part of a larger kernel multiplies its neighbours by 0, and 0 * inf = nan. For finite inputs this changes nothing."
)


@dataclass(frozen=True)
class Difference:
    """Where a value differs most from the truth; errors are relative to the largest value."""

    index: tuple[int, ...]
    place: str
    """`border` (the first or last pixel of a spatial axis), `interior`, or nothing where there is no spatial axis."""
    border: float
    interior: float

    def __str__(self) -> str:
        sides = f", {self.place} (border {self.border:.2g}, interior {self.interior:.2g})" if self.place else ""
        return f"index {self.index}{sides}"


@dataclass(frozen=True)
class Comparison:
    """One output tensor of one trial. Errors are relative to the largest value of the original in float64."""

    output: str
    error: float
    """Of the collapsed model."""
    own_error: float
    """Of the original in its own dtype: rounding alone."""
    allowed: float
    difference: Difference | None
    problem: str = ""
    """What no error measures: another shape or dtype, or non-finite values at other places."""

    def __bool__(self) -> bool:
        return not self.problem and self.error <= self.allowed


@dataclass(frozen=True)
class Trial:
    """One input given to both models."""

    inputs: str
    memory_format: str
    comparisons: tuple[Comparison, ...]
    problem: str = ""
    """Why nothing could be compared."""

    def __bool__(self) -> bool:
        return not self.problem and all(self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        """The output that comes closest to what is allowed, or furthest beyond it."""
        return max(self.comparisons, key=lambda c: (bool(c.problem), c.error / c.allowed), default=None)


@dataclass(frozen=True)
class Parting:
    """The first layer at which the two models part, in float64 and on equal inputs."""

    layer: str
    """Its name in the collapsed model."""
    computes: str
    """The layer of the original whose value it should give; nothing where that is not told."""
    error: float | None
    difference: Difference | None

    def __str__(self) -> str:
        computes = f" (computes {self.computes})" if self.computes and self.computes != self.layer else ""
        error = "" if self.error is None else f", error {self.error:.2g} at {self.difference}"
        return f"{self.layer}{computes}{error}"


@dataclass(frozen=True)
class Probe:
    """How many outputs are not finite where one element of the input is not."""

    pixel: str
    original: int
    collapsed: int
    outputs: int


@dataclass(frozen=True)
class Verdict:
    """Truthy if the two models are equal up to the original's own rounding; prints as a table."""

    model: str
    dtype: str
    trials: tuple[Trial, ...]
    ratio: float | None
    """Mean over trials of the collapsed model's error over the original's own; None where the original has none."""
    parted: Parting | None
    """Where the two part, if they do and it could be found."""
    not_localised: str
    """Why it could not be found."""
    probes: tuple[Probe, ...]
    sensitivity: float | None
    """How much the original's outputs differ between two random inputs, relative to their size; None if they cannot."""

    @property
    def equal(self) -> bool:
        """Outputs agree, and layers too where these would not tell."""
        return all(self.trials) and self.parted is None

    def __bool__(self) -> bool:
        return self.equal

    @property
    def worst(self) -> Trial:
        """The trial that comes closest to what is allowed, or goes furthest beyond it."""
        return max(self.trials, key=_badness)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "equal": self.equal, **asdict(self)}

    def __str__(self) -> str:
        title = f"fxrep.verify: {self.model} in {self.dtype}: {'equal' if self else 'NOT EQUAL'}"
        return "\n\n".join([title, _trials(self.trials), "\n".join(self._lines()), *_probes(self.probes)])

    def _lines(self) -> list[str]:
        ratio = "the original has no error" if self.ratio is None else f"{self.ratio:.2f}"
        lines = [f"error, collapsed / original: {ratio}"]
        worst = self.worst.worst
        if worst is not None and worst.difference is not None and worst.error:
            lines.append(f"largest difference: {worst.output}, {worst.difference}")
        if not self:
            lines.append(
                f"parted at: {self.parted}" if self.parted else f"not localised: {self.not_localised or ALL_AGREE}"
            )
        if is_blind(self.sensitivity):
            lines.append(
                f"between two random inputs the outputs differ by only {self.sensitivity:.2g} of their size, and"
            )
            lines.append(f"would hide a wrong layer: {self._layers()}")
        return lines

    def _layers(self) -> str:
        if self.parted is not None:
            return "one differs"
        return f"layers could not be compared ({self.not_localised})" if self.not_localised else "but all layers agree"


def is_blind(sensitivity: float | None) -> bool:
    """Whether outputs depend so little on the input that a wrong layer may go unseen."""
    return sensitivity is not None and sensitivity < BLIND


def _badness(trial: Trial) -> tuple[bool, bool, float]:
    worst = trial.worst
    if worst is None:
        return bool(trial.problem), False, 0.0
    return False, bool(worst.problem), worst.error / worst.allowed


def _trials(trials: tuple[Trial, ...]) -> str:
    """One row a trial, with its worst output."""
    rows = [(t.inputs, t.memory_format, *_cells(t), "yes" if t else "NO") for t in trials]
    headers = ("input", "memory", "output", "collapsed", "original", "allowed", "equal")
    table = tabulate(rows, headers, disable_numparse=True)
    problems = dict.fromkeys(t.problem or (t.worst.problem if t.worst is not None else "") for t in trials)
    return "\n".join([table, *filter(None, problems)])


def _cells(trial: Trial) -> tuple[str, ...]:
    worst = trial.worst
    if worst is None:
        return "", "-", "-", "-"
    if worst.difference is None and worst.problem:
        return worst.output, "-", "-", "-"
    return worst.output, f"{worst.error:.2g}", f"{worst.own_error:.2g}", f"{worst.allowed:.2g}"


def _probes(probes: tuple[Probe, ...]) -> list[str]:
    if not probes:
        return []
    rows = [(f"one {p.pixel} in the input", f"{p.original} of {p.outputs}", f"{p.collapsed}") for p in probes]
    table = tabulate(rows, ("outputs that are not finite", "original", "collapsed"), disable_numparse=True)
    return [f"{table}\n{KERNEL_ZEROS}" if any(p.collapsed > p.original for p in probes) else table]
