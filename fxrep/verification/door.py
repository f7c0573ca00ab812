"""The public door of verification."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedParameter

from fxrep.errors import FxrepError
from fxrep.verification.compare import FACTOR, ROUNDED, Leaf, compare, difference, judged
from fxrep.verification.inputs import Case, Examples, Sampler, own_size, sampler
from fxrep.verification.localise import localise
from fxrep.verification.models import copied, kinds, like, run, wide, widened
from fxrep.verification.verdict import Comparison, Parting, Probe, Trial, Verdict, is_blind
from fxrep.wrappers import unwrapped

FAILED, UNSEEN = 16, 256
"""How far a layer's value may be from the original's, in units of rounding of the weights, before it is named: where
the outputs differ, and where they agree but would hide a difference. Correct folds measure below 1."""


def verify(
    original: nn.Module, collapsed: nn.Module, example_inputs: Examples = None, *, trials: int = 4, seed: int = 0
) -> Verdict:
    """Runs both on random inputs and compares their errors, with the original in float64 as the truth.

    The two are equal if, for every output of every trial, the largest error of the collapsed model is at most 4 times
    the original's own error in its dtype, plus 2 units of rounding (in float64, where the original has no error:
    1e-10), relative to the largest value; and if values are not finite at the same places. Where the weights of the
    collapsed model, run in float64, are within that, so that the rest is rounding, it may be 8 times. Where the
    outputs hardly depend on the input, as in a network that was never trained, all layers must agree as well.

    Args:
        original: any module; both run as copies in eval mode and are not touched, nor is the random state. Of an
            original that is compiled, or in DataParallel, the model inside is run.
        collapsed: what should give the same, in the same dtype and on the same device.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Their shapes and dtypes matter;
            numbers are random, but for arguments that are no floating-point tensors; they are brought to the model's
            device. They may be left out where the network itself tells the shapes that it takes.
        trials: how many inputs. In turn: the example's own size, an odd, an even and the smallest that runs, at batches
            of 2, 3 and 1, contiguous or channels_last.
        seed: of the random numbers.

    Returns:
        A `Verdict`: truthy if the two are equal. It says how errors compare, where the largest difference sits, the
        first layer at which the two part, and what a single inf or nan in the input does. `print` gives a table.

    Raises:
        FxrepError: wrong arguments, or no input on which the original runs.
    """
    _check(original, collapsed, trials)
    original = unwrapped(original)
    own, new, truth = copied(original), copied(collapsed), widened(original)

    def attempt(case: Case) -> str | None:
        outputs = run(own, case)
        return outputs if isinstance(outputs, str) else _useless(outputs)

    with torch.no_grad():
        draws = sampler(original, example_inputs, seed, like(original), attempt)
        cases = list(draws.cases(trials, attempt))
        found = [_compared(case, own, new, truth) for case in cases]
        done = _judged(cases, found, FACTOR)
        if not all(done) and _is_rounding(cases, done, widened(collapsed), truth):
            done = _judged(cases, found, ROUNDED)
        sensitivity = _sensitivity(draws, truth)
        failed = [case for case, trial in zip(cases, done, strict=True) if not trial]
        parting: Parting | str | None = None
        if failed or is_blind(sensitivity):
            parting = _parting(original, collapsed, (failed or cases)[0], FAILED if failed else UNSEEN)
        probes = tuple(p for name in ("inf", "nan") if (p := _probe(name, draws, own, new)))
    dtype = str(like(original)[0]).removeprefix("torch.")
    parted, why = (None, parting) if isinstance(parting, str) else (parting, "")
    return Verdict(type(original).__name__, dtype, done, _ratio(done), parted, why, probes, sensitivity)


def _check(original: nn.Module, collapsed: nn.Module, trials: int) -> None:
    for name, model in (("original", original), ("collapsed", collapsed)):
        _check_model(name, model)
    if not _is_count(trials):
        raise FxrepError(f"trials is {trials!r}; pass how many inputs to try, 1 or more")
    old, new = kinds(original), kinds(collapsed)
    if old and new and not old & new:
        raise FxrepError(
            f"the original is {_told(old)} and collapsed is {_told(new)}; bring both to one dtype and device"
        )


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _check_model(name: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise FxrepError(f"{name} is a {type(model).__name__}, not a torch.nn.Module; pass the model itself")
    for path, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise FxrepError(
                f"{name}: the lazy parameter {path} has no shape yet; run the model once on an input first"
            )
        if parameter.is_meta:
            raise FxrepError(
                f"{name}: the parameter {path} is on meta, where there are no numbers to compare; load weights onto "
                "cpu first, with load_state_dict(state, assign=True)"
            )


def _told(kinds: set[tuple[torch.dtype, torch.device]]) -> str:
    return " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))


def _useless(outputs: list[Leaf]) -> str | None:
    values = [o.value for o in outputs if isinstance(o.value, Tensor)]
    if not values:
        return "it gives no tensor"
    return None if any(bool(v.isfinite().any()) for v in values) else "it gives no finite value"


def _compared(case: Case, own: nn.Module, new: nn.Module, truth: nn.Module) -> list[Comparison] | str:
    expected, rounded, got = run(truth, case.mapped(wide)), run(own, case), run(new, case)
    if isinstance(expected, str):
        raise FxrepError(
            f"the original does not run in float64, which is the truth here ({case}): {expected}; of a network made "
            "for one dtype, as quantised ones are, verify or convert the one that it was made from"
        )
    if isinstance(rounded, str):
        return f"the original does not run on {case}: {rounded}"
    return (
        f"the collapsed model does not run on {case}: {got}"
        if isinstance(got, str)
        else compare(expected, rounded, got)
    )


def _is_rounding(cases: Sequence[Case], done: Sequence[Trial], exact: nn.Module, truth: nn.Module) -> bool:
    """Whether the collapsed model is as near as it should be where it runs in float64, in every trial that failed.

    What is beyond that in its own dtype comes from the kernels that run it.
    """
    return all(trial or _is_near(case, trial, exact, truth) for case, trial in zip(cases, done, strict=True))


def _is_near(case: Case, trial: Trial, exact: nn.Module, truth: nn.Module) -> bool:
    if trial.problem:
        return False
    expected, got = run(truth, case.mapped(wide)), run(exact, case.mapped(wide))
    if isinstance(expected, str) or isinstance(got, str):
        return False
    found = compare(expected, expected, got)
    if isinstance(found, str) or len(found) != len(trial.comparisons):
        return False
    return all(not f.problem and f.error <= c.allowed for f, c in zip(found, trial.comparisons, strict=True))


def _judged(cases: Sequence[Case], found: Sequence[list[Comparison] | str], factor: float) -> tuple[Trial, ...]:
    comparisons = judged([[] if isinstance(f, str) else f for f in found], factor)
    return tuple(
        Trial(str(case), case.memory_format, tuple(done), f if isinstance(f, str) else "")
        for case, done, f in zip(cases, comparisons, found, strict=True)
    )


def _parting(original: nn.Module, collapsed: nn.Module, case: Case, units: float) -> Parting | str | None:
    """Where the two part on this input, or why that cannot be told, or None if all layers agree."""
    if not isinstance(collapsed, GraphModule):
        return f"collapsed is a {type(collapsed).__name__}, no torch.fx.GraphModule whose layers could be compared"
    rounding = max((torch.finfo(dtype).eps for dtype, _ in kinds(collapsed)), default=0.0)
    beside = widened(collapsed)
    assert isinstance(beside, GraphModule)
    return localise(widened(original), beside, case.mapped(wide), units * rounding)


def _ratio(trials: Sequence[Trial]) -> float | None:
    sums = [(sum(c.error for c in t.comparisons), sum(c.own_error for c in t.comparisons)) for t in trials]
    return mean(ratios) if (ratios := [new / own for new, own in sums if own]) else None


def _probe(name: str, draws: Sampler, own: nn.Module, new: nn.Module) -> Probe | None:
    """Runs both on an input with one element that is not finite; None where that cannot be done."""
    case = draws.draw(own_size, None, False, 0)
    target = next((t for t in case.tensors() if t.is_floating_point() and t.numel()), None)
    if target is None:
        return None
    index = [0, 0, *(n // 2 for n in target.shape[2:])][: target.ndim]
    target[tuple(index)] = float(name)
    outputs, others = run(own, case), run(new, case)
    if isinstance(outputs, str) or isinstance(others, str):
        return None
    (spoiled, total), (spoiled_too, _) = _not_finite(outputs), _not_finite(others)
    return Probe(name, spoiled, spoiled_too, total)


def _not_finite(outputs: list[Leaf]) -> tuple[int, int]:
    values = [o.value for o in outputs if isinstance(o.value, Tensor)]
    return sum(int((~v.isfinite()).sum()) for v in values), sum(v.numel() for v in values)


def _sensitivity(draws: Sampler, truth: nn.Module) -> float | None:
    """How much outputs differ between two random inputs; a network that forgets its input hides every error."""
    cases = [draws.draw(own_size, None, False, number) for number in (0, 1)]
    if not any(t.is_floating_point() for t in cases[0].tensors()):
        return None
    one, other = (run(truth, case.mapped(wide)) for case in cases)
    if isinstance(one, str) or isinstance(other, str):
        return None
    pairs = [(a.value, b.value) for a, b in zip(one, other, strict=False) if isinstance(a.value, Tensor)]
    places = [difference(a, b, a.isfinite() & b.isfinite()) for a, b in pairs if a.shape == b.shape]
    return max((max(p.border, p.interior) for p in places if p), default=None)
