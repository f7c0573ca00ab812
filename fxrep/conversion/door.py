"""The public door of conversion: model and checkpoint in, a file that was run and found equal out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from fxrep.api import reparameterize
from fxrep.conversion.formats import Format, Payload, Runner, format_for, program_of
from fxrep.conversion.placing import cannot_be_stored, check_target, moved_when_done
from fxrep.conversion.weights import load_weights
from fxrep.errors import FxrepError, Unusable
from fxrep.kernel import is_plain
from fxrep.report import Report
from fxrep.trees import on_meta
from fxrep.verification import Comparison, Trial, Verdict, verify
from fxrep.verification.compare import ROUNDED, Leaf, compare, judged
from fxrep.verification.inputs import Case, Examples, Known, own_size, sampler
from fxrep.verification.models import copied, like, run, wide, widened

TRIALS = 3
APART = ("not-traceable", "reached-into")
"""Refusals of what a module's own forward hides, and its exported program shows."""
CHAOTIC = 0.1
"""Relative error of the original in the file's dtype beyond which nothing is told by the file's own."""
SHORT = MappingProxyType({"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"})


@dataclass(frozen=True)
class Conversion:
    """A file that was written, and how it compares. Prints as a few lines."""

    path: str
    files: tuple[str, ...]
    """All that was written, weights beside the file among them."""
    format: str
    dtype: str
    notes: tuple[str, ...]
    """What was done to the checkpoint's names on the way, and what of the outputs and open axes could not be told."""
    report: Report
    verdict: Verdict
    """The collapsed network against the original, in the original's dtype."""
    trials: tuple[Trial, ...]
    """The file, run by its own runtime, against the original in float64."""

    @property
    def worst(self) -> Comparison:
        return max((c for t in self.trials for c in t.comparisons), key=lambda c: c.error / c.allowed)

    def to_dict(self) -> dict[str, Any]:
        """For scripts: plain values, without the trials."""
        worst = self.worst
        return {
            "path": self.path, "files": list(self.files), "format": self.format, "dtype": self.dtype,
            "notes": list(self.notes), "equal": True, "error": worst.error, "own_error": worst.own_error,
            "allowed": worst.allowed, "before": dict(self.report.before), "after": dict(self.report.after),
        }  # fmt: skip

    def __str__(self) -> str:
        before, after, worst = self.report.before, self.report.after, self.worst
        counts = ", ".join(f"{k} {before[k]} → {after[k]}" for k in before if before[k] or after[k])
        runs = "; ".join(dict.fromkeys(t.inputs for t in self.trials))
        lines = [
            *self.notes,
            f"{self.report.model}: {counts}",
            f"{', '.join(self.files)}: {self.format} in {self.dtype}, run on {runs}: error {worst.error:.2g}, "
            f"the original's own {worst.own_error:.2g}, allowed {worst.allowed:.2g}",
        ]
        return "\n".join(lines)


def convert(
    model: nn.Module, path: str | Path, example_inputs: Examples = None, *, to: str | None = None,
    weights: str | Path | None = None, entry: str | None = None, ignore: Sequence[str] = (), trust: bool = False,
    dtype: str | torch.dtype | None = None, dynamic: Sequence[int] = (), strict: bool = False, force: bool = False,
) -> Conversion:  # fmt: skip
    """Collapses the model, writes it, and runs the file against the original before it gets its name.

    The file is written in a folder beside `path`, and moved when its outputs, from its own runtime, are as close to the
    original in float64 as the original is in the file's dtype (at most 8 times as far: `fxrep.verify` has the rule).
    Otherwise, and after an interrupt, nothing is left. Weights in files of their own are moved first, the file itself
    last. In ONNX the inputs are called as the forward calls its arguments, the outputs by their keys: `logits`,
    `maps_0`; `output` or `output_0` where there is no key; `x_1` where an input is called `x`.

    Args:
        model: any module; it is not touched.
        path: the file to be; its folder exists.
        example_inputs: a tensor, a tuple or a dict of arguments: what the file is made for. A state dict needs none.
        to: `pt2`, `onnx`, `openvino` or `state_dict`; by default what the suffix of `path` says.
        weights: a checkpoint to load first; `entry`, `ignore` and `trust` are those of `fxrep.load_weights`.
        entry: see there.
        ignore: see there.
        trust: see there.
        dtype: of the file, such as `float16` (or `fp16`); by default the model's own.
        dynamic: the axes of the inputs whose size stays open, such as (0, 2, 3); 0 is the batch. The file is run
            at other sizes of them too, where the original takes any.
        strict: as for `reparameterize`.
        force: overwrite.

    Raises:
        Unusable: the path, the weights, a name or a runtime cannot be used.
        FxrepError: the network cannot be exported, or the file is not equal.
    """
    _check_arguments(model, path, dynamic)
    target = Path(path)
    form = format_for(target, to)
    check_target(target, force)
    form.check_installed()
    if form.has_program and example_inputs is None:
        raise Unusable(
            f"a file of {form.name} is made for an input: give example_inputs, or --input on the command line"
        )
    kind = _dtype(dtype, model)
    _check_axes(dynamic, example_inputs)
    original = copied(model)
    notes = () if weights is None else load_weights(original, weights, entry=entry, ignore=ignore, trust=trust)
    _check_numbers(original)
    # What a finer dtype is asked for is folded in it; what a coarser one is, is rounded at the end.
    finer = torch.promote_types(kind, like(original)[0])
    original, example_inputs = original.to(finer), tree_map_only(Tensor, partial(_cast, finer), example_inputs)
    collapsed = reparameterize(original, example_inputs, strict=strict)
    report: Report = collapsed.report  # type: ignore[assignment]
    verdict = verify(original, collapsed, example_inputs)
    if not verdict:
        raise FxrepError(f"the collapsed network is not equal to the original; nothing was written\n{verdict}")
    cases = _cases(original, example_inputs, tuple(dynamic))
    payload = _payload(collapsed, form, cases, kind, tuple(dynamic))
    if payload.program is not None and any(r.code in APART for r in report.refusals):
        payload, report = _collapsed_again(payload, payload.program, report, strict)
    with moved_when_done(target, force) as scratch:
        trials = _run(_written(form, payload, scratch, kind), original, cases, kind)
        files = tuple(sorted(str(target.parent / f.name) for f in scratch.parent.iterdir()))
    name = str(kind).removeprefix("torch.")
    notes = (*notes, *_undecided(trials, name), *_unopened(trials, dynamic))
    return Conversion(str(target), files, form.name, name, notes, report, verdict, trials)


def _undecided(trials: Sequence[Trial], dtype: str) -> Iterator[str]:
    """Of outputs that rounding alone turns over, such as the places of equal scores, a comparison tells nothing."""
    worst = max((c for t in trials for c in t.comparisons), key=lambda c: c.own_error)
    if worst.own_error > CHAOTIC:
        yield (
            f"the original's own {worst.output} in {dtype} is off by {worst.own_error:.2g} from the one in float64, so "
            "that running the file tells little of it; --dtype fp64 would"
        )


def _unopened(trials: Sequence[Trial], dynamic: Sequence[int]) -> Iterator[str]:
    if dynamic and len({t.inputs for t in trials}) == 1:
        yield f"the original ran at no other size than {trials[0].inputs}, so that open axes say nothing of the file"


def _check_arguments(model: object, path: object, dynamic: object) -> None:
    if isinstance(model, ExportedProgram):
        raise Unusable("got an ExportedProgram; pass the module, or save what reparameterize(program) gives")
    if not isinstance(model, nn.Module):
        raise Unusable(f"the first argument is a {type(model).__name__}, not a torch.nn.Module; convert(model, path)")
    if isinstance(model, torch.jit.ScriptModule):
        raise Unusable("a TorchScript program cannot be collapsed; convert the module that it was made from")
    if not isinstance(path, (str, os.PathLike)):
        raise Unusable(f"the path is a {type(path).__name__}; name the file to write, such as 'net.onnx'")
    if not isinstance(dynamic, (tuple, list)) or not all(type(axis) is int for axis in dynamic):
        raise Unusable(f"dynamic is {dynamic!r}; give the axes to leave open, such as (0,) for the batch")


def _check_axes(dynamic: Sequence[int], examples: Examples) -> None:
    ranks = [t.ndim for t in tree_leaves(examples) if isinstance(t, Tensor)]
    strange = [axis for axis in dynamic if ranks and not 0 <= axis < max(ranks)]
    if strange:
        raise Unusable(f"no input has an axis {strange[0]} to leave open: they are counted from 0 to {max(ranks) - 1}")


def _check_numbers(model: nn.Module) -> None:
    """Nothing can be compared where weights are no numbers, as after a training that diverged."""
    empty = on_meta(dict(model.named_parameters()))
    if empty is not None:
        raise Unusable(f"the weights {empty} are on meta, where there are no numbers; build the model on cpu")
    plain = ((name, p) for name, p in model.named_parameters() if p.is_floating_point() and is_plain(p))
    strange = [name for name, p in plain if bool(p.isnan().any())]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise Unusable(f"the weights {strange[0]}{more} hold nan, so nothing can be compared; take an older checkpoint")


def _dtype(dtype: str | torch.dtype | None, model: nn.Module) -> torch.dtype:
    name = SHORT.get(dtype, dtype) if isinstance(dtype, str) else ""
    found = getattr(torch, name, None) if name else dtype or like(model)[0]
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise Unusable(f"{dtype!r} is no floating-point dtype: float32, float16, bfloat16 or float64")
    return found


def _cases(original: nn.Module, examples: Examples, dynamic: tuple[int, ...]) -> list[Case]:
    """What the file is run on: random numbers of the example's sizes, and of others along the dynamic axes."""

    def attempt(case: Case) -> str | None:
        outputs = run(original, case)
        return outputs if isinstance(outputs, str) else None

    with torch.no_grad():
        drawn = sampler(original, examples, 0, like(original), attempt)
        if not dynamic:
            return [drawn.draw(own_size, None, False, i) for i in range(TRIALS)]
        open_ = replace(drawn, known={name: _fixed_but(dynamic, value) for name, value in drawn.own.arguments.items()})
        return [replace(case, memory_format="contiguous") for case in open_.cases(TRIALS, attempt)]


def _fixed_but(dynamic: tuple[int, ...], value: Any) -> Known:
    if not isinstance(value, Tensor):
        return Known()
    return Known(value.ndim, {axis - value.ndim: n for axis, n in enumerate(value.shape) if axis not in dynamic})


def _payload(
    collapsed: nn.Module, form: Format, cases: list[Case], kind: torch.dtype, dynamic: tuple[int, ...]
) -> Payload:
    module = collapsed.to("cpu", kind)
    if not form.has_program:
        return Payload(module, None)
    with torch.no_grad():
        return Payload(module, program_of(module, cases[0].mapped(partial(_on_cpu, kind)), dynamic))


def _collapsed_again(
    payload: Payload, program: ExportedProgram, report: Report, strict: bool
) -> tuple[Payload, Report]:
    """The program collapsed in its turn: capturing it went through the forwards that could not be traced."""
    again = reparameterize(program, strict=strict)
    found: Report = again.report  # type: ignore[attr-defined]
    hidden = {kind: found.before[kind] - n for kind, n in report.after.items()}  # ops that no module shows
    whole = replace(
        report, collapses=(*report.collapses, *found.collapses), refusals=found.refusals, after=found.after,
        before={kind: n + hidden[kind] for kind, n in report.before.items()}, cost_after=found.cost_after,
        cost_before=report.cost_before + found.cost_before - report.cost_after,
    )  # fmt: skip
    return replace(payload, program=again), whole


def _on_cpu(kind: torch.dtype, tensor: Tensor) -> Tensor:
    return _cast(kind, tensor.cpu())


def _cast(kind: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(kind) if tensor.is_floating_point() else tensor


def _written(form: Format, payload: Payload, path: Path, kind: torch.dtype) -> Runner:
    try:
        form.write(payload, path)
        return form.open(path, payload.module)
    except Exception as error:  # exporters and runtimes may raise anything
        no_space = cannot_be_stored(error, path)
        if no_space:
            raise Unusable(f"{path.name} cannot be written: {no_space}; nothing was left") from error
        fact = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
        raise FxrepError(
            f"{form.name} cannot hold or run this network in {str(kind).removeprefix('torch.')} ({fact}); nothing was "
            "written; another format or dtype may do"
        ) from error


def _run(runner: Runner, original: nn.Module, cases: list[Case], kind: torch.dtype) -> tuple[Trial, ...]:
    """The file beside the original in the file's dtype, with the original in float64 as the truth.

    Raises FxrepError where it does not run, or is not equal.
    """
    truth, own = widened(original).cpu(), copied(original).to("cpu", kind)
    with torch.no_grad():
        found = [_compared(runner, truth, own, case.mapped(partial(_on_cpu, kind))) for case in cases]
    trials = tuple(
        Trial(str(c), c.memory_format, tuple(done)) for c, done in zip(cases, judged(found, ROUNDED), strict=True)
    )
    for trial in trials:
        worst = trial.worst
        if not trial and worst is not None:
            fact = worst.problem or (
                f"{worst.output} is off by {worst.error:.2g}, the original's own error is {worst.own_error:.2g}, "
                f"allowed are {worst.allowed:.2g}"
            )
            raise FxrepError(f"the written file is not equal to the original on {trial.inputs}: {fact}; it was removed")
    return trials


def _compared(runner: Runner, truth: nn.Module, own: nn.Module, case: Case) -> list[Comparison]:
    expected, rounded = run(truth, case.mapped(wide)), run(own, case)
    if isinstance(expected, str) or isinstance(rounded, str):
        error = expected if isinstance(expected, str) else rounded
        raise FxrepError(f"the original does not run on {case} in the dtype asked for, so nothing can be told: {error}")
    result = compare(expected, rounded, _outputs(runner, case, rounded))
    if isinstance(result, str):
        raise FxrepError(f"the written file gives other outputs ({result}); it was removed")
    return result


def _outputs(runner: Runner, case: Case, rounded: list[Leaf]) -> list[Leaf]:
    try:
        return runner(case, rounded)
    except Exception as error:  # a runtime may raise anything
        fact = " ".join(str(error).split())[:240]
        raise FxrepError(
            f"the written file does not run on {case} ({type(error).__name__}: {fact}); it was removed; another format "
            "or dtype may do"
        ) from error
