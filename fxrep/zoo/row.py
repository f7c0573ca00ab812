"""One network's row: what was measured, and the judgement that follows from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from fxrep.zoo.kinds import KINDS

MOST_ERROR = 1e-9
"""In float64, relative to the largest value; a correct collapse measures below 1e-11 on the deepest networks."""
FACTOR, FLOOR = 4.0, 2.4e-7
"""In float32: how many times the original's own error, and two units of rounding."""
EQUAL, SHORT, DIFFERENT = "equal", "short", "different"
COMPARED = (*KINDS, "macs", "params")
OTHERS = ("conv", "bn", "add")


@dataclass(frozen=True)
class Row:
    """`before` and `after` are executed calls by kind, multiply-adds and parameters; `timm` and `fuse` what those tools
    leave, or the exception's name. `error` is that of the collapsed network in float64, `own32` and `new32` are the
    errors of the original and of the collapsed network in float32, with the original in float64 as the truth."""

    name: str
    failed: str = ""
    input: str = ""
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    timm: dict[str, int] | str = ""
    fuse: dict[str, int] | str = ""
    unfolded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    error: float | None = None
    own32: float | None = None
    new32: float | None = None
    sensitivity: float | None = None
    seconds: float = 0.0
    versions: str = ""

    @property
    def ratio(self) -> float | None:
        return self.new32 / self.own32 if self.own32 and self.new32 is not None else None

    @property
    def is_equal(self) -> bool:
        if self.error is None or not self.error <= MOST_ERROR:
            return False
        return self.own32 is None or self.new32 is None or self.new32 <= FACTOR * self.own32 + FLOOR

    @property
    def status(self) -> str:
        if self.failed:
            return "failed"
        return (SHORT if self.shortfalls else EQUAL) if self.is_equal else DIFFERENT

    @property
    def shortfalls(self) -> tuple[str, ...]:
        """Where it falls short of never more than before, never more than timm leaves, no BN left that folds."""
        return (*self.more, *self.beaten, *self.left)

    @property
    def more(self) -> tuple[str, ...]:
        return tuple(f"{k} {self.before[k]} → {self.after[k]}" for k in COMPARED if self.after[k] > self.before[k])

    @property
    def beaten(self) -> tuple[str, ...]:
        timm = self.timm if isinstance(self.timm, dict) else {}
        return tuple(f"timm leaves {n} {k}, not {self.after[k]}" for k, n in timm.items() if self.after[k] > n)

    @property
    def left(self) -> tuple[str, ...]:
        return tuple(f"{self.unfolded.count(side)} bn {side}" for side in sorted(set(self.unfolded)))

    @property
    def why(self) -> str:
        """In one phrase."""
        if self.failed:
            return self.failed
        facts = list(self.shortfalls)
        if not self.is_equal:
            facts.insert(0, f"error {self.error:.1e}, in float32 {self.new32:.1e} (own {self.own32:.1e})")
        return "; ".join([*facts, *(self.kept[:1] if facts else ())])

    def to_json(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if v not in (None, "", (), {})}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        values: dict[str, Any] = json.loads(line)
        for name in ("unfolded", "kept"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)
