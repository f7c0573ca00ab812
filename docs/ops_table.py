"""The table of ops that are read, from the readers themselves: `python docs/ops_table.py > docs/ops.md`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload

from fxrep.readers import registered
from fxrep.readers.registry import First

INTRODUCTION = """\
# Ops that are read

Written by `python docs/ops_table.py` from the readers, and compared with them by a test. Everything else stays as it
is: an activation is no affine map, and no reader is needed to leave it alone. A missing op is
[one small function](add-an-op.md).
"""
PLACES = ((nn, "nn"), (F, "F"), (torch, "torch"))


def document() -> str:
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {formula} |" for formula, names in ops().items()]
    return "\n".join([INTRODUCTION, "| op | read as |", "|---|---|", *rows])


def ops() -> dict[str, list[str]]:
    """First line of a reader's docstring -> its ops; one without a docstring is another spelling of the one before."""
    found: dict[str, list[str]] = {}
    formula = ""
    for target, read in registered().items():
        formula = (inspect.getdoc(read) or formula).partition("\n")[0]
        found.setdefault(formula, []).append(name_of(target))
    return found


def name_of(target: Any) -> str:
    if isinstance(target, First):
        return f"{name_of(target.target)}[0]"
    if isinstance(target, str):
        return f"x.{target}()"
    if isinstance(target, OpOverload):
        return str(target)
    for module, short in PLACES:
        if getattr(module, target.__name__, None) is target:
            return f"{short}.{target.__name__}"
    return f"{target.__module__.removeprefix('_')}.{target.__name__}"


if __name__ == "__main__":
    print(document())
