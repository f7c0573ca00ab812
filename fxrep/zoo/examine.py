"""One network, examined from end to end; runs in a process of its own."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils._pytree import tree_map_only

import fxrep
from fxrep.api import reparameterize
from fxrep.calibration import version_of
from fxrep.verification.compare import difference, leaves
from fxrep.zoo.calls import Calls, Widened
from fxrep.zoo.preparation import Arguments, arguments_for, calibrate, call, randomise
from fxrep.zoo.row import OTHERS, Row

MOST_PARAMETERS = 3e8
"""Above, the other tools are not tried: they copy the model."""
BROKEN = ("certificate-failed", "reader-failed", "not-traceable")


def examine(name: str, load: Callable[[str], nn.Module]) -> Row:
    """Builds, randomises, collapses, compares and counts; whatever raises is the caller's to tell."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model = load(name).eval()
    randomise(model)
    arguments = arguments_for(model)
    calibrate(model, arguments)
    own, before = _counted(model, arguments)
    params = _parameters(model)
    tools = {"timm": _timm, "fuse": fuse} if params < MOST_PARAMETERS else {}
    others = {name: _left_by(tool, model, arguments) for name, tool in tools.items()}
    collapsed = reparameterize(model)
    report: Any = collapsed.report
    new, after = _counted(collapsed, arguments)
    after_params = _parameters(collapsed)
    del collapsed
    gc.collect()
    truth, wide = _in_float64(model, arguments)
    return Row(
        name=name,
        input=", ".join("×".join(map(str, leaf.value.shape)) for leaf in leaves(arguments)),
        before={**before.counts, "macs": before.macs, "params": params},
        after={**after.counts, "macs": after.macs, "params": after_params},
        timm=others.get("timm", ""),
        fuse=others.get("fuse", ""),
        unfolded=tuple(after.unfolded()),
        kept=tuple(f"{r.node}: {r.code}, {r.reason}" for r in report.refusals if r.code in BROKEN)[:3],
        error=_error(wide, truth),
        own32=_error(own, truth),
        new32=_error(new, truth),
        sensitivity=_sensitivity(truth),
        seconds=round(time.perf_counter() - start, 1),
        versions=_versions(),
    )


def _counted(model: nn.Module, arguments: Arguments) -> tuple[Any, Calls]:
    with Calls() as calls:
        out = call(model, arguments)
    return out, calls


def _parameters(model: nn.Module) -> int:
    """Stored numbers: parameters, and buffers: statistics are folded, fixed kernels become weights."""
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


def _timm(model: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


def _left_by(tool: Callable[[nn.Module], nn.Module], model: nn.Module, arguments: Arguments) -> dict[str, int] | str:
    """What another tool leaves, or how it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, calls = _counted(tool(copy.deepcopy(model)).eval(), arguments)
    except Exception as error:  # theirs, and recorded as such
        return type(error).__name__
    return {kind: calls.counts[kind] for kind in OTHERS}


def _in_float64(model: nn.Module, arguments: Arguments) -> tuple[Any, Any]:
    """The original's output, the truth, and the collapsed network's; uses the model up."""
    torch.set_default_dtype(torch.float64)
    model.double()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.double()
    arguments = tree_map_only(Tensor, Tensor.double, arguments)
    with Widened():
        truth = call(model, arguments)
    collapsed = reparameterize(model, inplace=True)
    with Widened():
        return truth, call(collapsed, arguments)


def _error(got: Any, truth: Any) -> float:
    """The largest difference of any output, relative to that output's largest value."""
    mine, theirs = leaves(got), leaves(truth)
    if [leaf.path for leaf in mine] != [leaf.path for leaf in theirs]:
        return math.inf
    return max((_difference(a.value, b.value) for a, b in zip(mine, theirs, strict=True)), default=math.inf)


def _difference(got: Any, truth: Any) -> float:
    if not isinstance(truth, Tensor):
        return 0.0 if got == truth else math.inf
    if got.shape != truth.shape or not bool((got.isfinite() == truth.isfinite()).all()):
        return math.inf
    where = difference(got, truth, truth.isfinite())
    return max(where.border, where.interior) if where else 0.0


def _sensitivity(truth: Any) -> float | None:
    """How much the outputs of the two inputs of a batch differ: a network that forgets its input hides every error."""
    batched = [leaf.value for leaf in leaves(truth) if isinstance(leaf.value, Tensor) and leaf.value.ndim > 1]
    found = [_difference(t[0], t[1]) for t in batched if t.shape[0] == 2 and t.is_floating_point()]
    return max(found, default=None)


def _versions() -> str:
    libraries = ("torch", "torchvision", "timm", "transformers")
    found = {"fxrep": f"{fxrep.__version__}{_revision()}", **{name: version_of(name) for name in libraries}}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _revision() -> str:
    """+COMMIT, where the package is run from its repository: a row is of the code that made it."""
    root = Path(fxrep.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
    )
    return f"+{described.stdout.strip()}" if described.returncode == 0 else ""
