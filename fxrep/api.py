"""The public door."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedParameter

from fxrep import exported
from fxrep.copying import structural_copy
from fxrep.cost import Aim, Profile, profile_for
from fxrep.errors import FxrepError
from fxrep.islands import Begin, Islands
from fxrep.ownership import carry_attributes, own_tensors
from fxrep.pipeline import Pipeline
from fxrep.refolding import Architecture, make_fold_plan
from fxrep.report import Report
from fxrep.trace import Traced
from fxrep.trees import named_modules, parameters
from fxrep.trials import Trials
from fxrep.wrappers import unwrapped

Examples = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | None


@overload
def reparameterize(
    model: nn.Module, example_inputs: Examples = None, *, inplace: bool = False, strict: bool = False,
    profile: Profile | None = None, objective: str = "latency", autotune: bool = False,
) -> nn.Module: ...  # fmt: skip
@overload
def reparameterize(
    model: ExportedProgram, *, strict: bool = False, profile: Profile | None = None, objective: str = "latency",
    autotune: bool = False,
) -> ExportedProgram: ...  # fmt: skip
def reparameterize(
    model: nn.Module | ExportedProgram,
    example_inputs: Examples = None,
    *,
    inplace: bool = False,
    strict: bool = False,
    profile: Profile | None = None,
    objective: str = "latency",
    autotune: bool = False,
) -> nn.Module | ExportedProgram:
    """The network with every affine region that pays replaced by the one convolution that it equals.

    Args:
        model: any module, in training or eval mode; it is not touched (but see `inplace`). Of a compiled one, or one
            in DataParallel, the model inside is collapsed: compile or wrap the result. Or a program of
            `torch.export.export`, before or after `run_decompositions`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. They sharpen costs, and tell
            the number of axes of each input where the network itself does not; nothing is specialised to their sizes.
        inplace: reuse the model's tensors instead of copying those that are kept; do not use the model afterwards.
        strict: keep branches apart where one kernel would turn an `inf` of the input into more `nan` than the branches
            give. A kernel holds zeros where a narrower branch (identity, 1x1) read nothing, and 0·inf is nan.
        profile: the device to choose for (default: the shipped profile of the device that holds the parameters);
            `fxrep.calibrate()` measures that of this machine.
        objective: what to make least: the predicted "latency", the "macs", or the "params". A plan never has more
            multiply-adds, weights or layers than the model, whatever the objective; for "params" a weight that several
            calls share is not copied either, to take a norm after each.
        autotune: time both sides of a collapse of which the prediction is unsure, at the sizes of `example_inputs`,
            and keep the faster. Another run may time, and so decide, otherwise.

    Returns:
        A `torch.fx.GraphModule` in eval mode, equal to `model.eval()`, with a `Report` at `.report`. Where the
        outermost forward cannot be traced: a copy of the model, with a report that says so. For a program: a program
        with the same inputs, outputs and range constraints, with its report at `.report` too (which is not saved).

    Raises:
        FxrepError: `model` is neither, `example_inputs` do not fit its forward, or what is asked for is not there.
    """
    if isinstance(model, ExportedProgram):
        _check_program(example_inputs, inplace)
        return exported.collapse(model, aim_of(model.state_dict.values(), profile, objective, autotune, True), strict)
    model = check_model(model)
    examples = bind_examples(model, example_inputs)
    with _no_collections():
        root = structural_copy(model)
        before = Architecture.of(root)
        begin = _pipeline(aim_of(model.parameters(), profile, objective, autotune, bool(examples)), strict)
        collapsed, report = Islands(root, begin, writes=True, inplace=inplace).collapse(examples)
        return finished(collapsed, root, model, before, report, inplace)


def explain(
    model: nn.Module | ExportedProgram,
    example_inputs: Examples = None,
    *,
    strict: bool = False,
    profile: Profile | None = None,
    objective: str = "latency",
) -> Report:
    """The report that `reparameterize` would give, without rewriting: nothing is folded, so nothing is certified."""
    if isinstance(model, ExportedProgram):
        _check_program(example_inputs)
        return exported.pipeline_of(model, aim_of(model.state_dict.values(), profile, objective), strict).explain()
    model = check_model(model)
    begin = _pipeline(aim_of(model.parameters(), profile, objective), strict)
    return Islands(structural_copy(model), begin, writes=False).collapse(bind_examples(model, example_inputs))[1]


@contextmanager
def _no_collections() -> Iterator[None]:
    """Many small objects are made here, all of them needed: each collection would look at the whole process in vain."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def aim_of(
    tensors: Iterable[Tensor],
    profile: Profile | None = None,
    objective: str = "latency",
    autotune: bool = False,
    sized: bool = False,
) -> Aim:
    """What is to be made least on the device that holds the tensors, by its shipped profile if by no other."""
    found = ((t.device, t.dtype) for t in tensors if t.is_floating_point())
    first = next(found, (torch.device("cpu"), torch.float32))
    if profile is not None and not isinstance(profile, Profile):
        raise FxrepError(f"profile is {profile!r}; pass a Profile, such as fxrep.calibrate(), or leave it out")
    chosen = profile or profile_for(first[0].type)
    if autotune and objective != "latency":
        raise FxrepError(f"autotune measures time, which objective={objective!r} does not ask for; leave one out")
    if autotune and not sized:
        raise FxrepError("autotune times layers at the sizes that the network meets: pass example_inputs")
    return Aim(chosen, objective, Trials(*first) if autotune else None)


def _pipeline(aim: Aim, strict: bool) -> Begin:
    """What starts the line for one traced module."""

    def begin(name: str, traced: Traced, examples: Mapping[str, Any]) -> Pipeline:
        return Pipeline(name, traced, examples, aim, strict)

    return begin


def _check_program(example_inputs: Examples, inplace: bool = False) -> None:
    if example_inputs is not None:
        raise FxrepError("an ExportedProgram knows the sizes of its inputs; leave example_inputs out")
    if inplace:
        raise FxrepError("inplace=True is for modules; an ExportedProgram is copied, leave it out")


def check_model(model: object) -> nn.Module:
    """The model itself, without what is only around it. Raises FxrepError for what is none."""
    if isinstance(model, nn.Module):
        _check_initialised(model)
        return unwrapped(model)
    if isinstance(model, Mapping):
        raise FxrepError(
            "got a state dict, not a model; build the model, call load_state_dict on it, and pass the model"
        )
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise FxrepError(f"got the class {model.__name__}; pass an instance, {model.__name__}(...)")
    if isinstance(model, (str, Path)):
        given = f"{type(model).__name__} {str(model)!r}"
        raise FxrepError(f"got the {given}, not a model; build it first, and fxrep.load_weights reads a checkpoint")
    if isinstance(model, Tensor):
        raise FxrepError("got a Tensor, not a torch.nn.Module; the model comes first, inputs after it")
    raise FxrepError(f"got {type(model).__name__}, not a torch.nn.Module; pass the model itself")


def _check_initialised(model: nn.Module) -> None:
    for name, parameter in parameters(named_modules(model)).items():
        if issubclass(type(parameter), UninitializedParameter):
            raise FxrepError(f"the lazy parameter {name} has no shape yet; run the model once on an input first")


def bind_examples(model: nn.Module, example_inputs: Examples) -> dict[str, Any]:
    """The example inputs by the names of the forward's parameters."""
    if example_inputs is None:
        return {}
    if not isinstance(example_inputs, (Tensor, tuple, list, Mapping)):
        kind = type(example_inputs).__name__
        raise FxrepError(f"example_inputs is a {kind}; pass a tensor, a tuple or a dict of arguments")
    if isinstance(model, torch.jit.ScriptModule):
        return {}  # which tells no names, and is not traced anyway
    signature = inspect.signature(model.forward)
    try:
        if isinstance(example_inputs, Mapping):
            bound = signature.bind(**example_inputs)
        else:
            bound = signature.bind(*((example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs))
    except TypeError as error:
        fact = f"{type(model).__name__}.forward{signature}: {error}"
        raise FxrepError(f"example_inputs do not fit {fact}{_shape_hint(example_inputs)}") from None
    return dict(bound.arguments)


def _shape_hint(given: Examples) -> str:
    if not isinstance(given, (tuple, list)) or not all(type(size) is int for size in given):
        return ""
    return f"; numbers are no inputs, a tensor of that shape is: torch.randn{tuple(given)}"


def finished(
    result: nn.Module, root: nn.Module, model: nn.Module, before: Architecture, report: Report, inplace: bool = False
) -> nn.Module:
    """Gives the result tensors of its own, the model's attributes, its hooks and the report."""
    if isinstance(result, GraphModule):
        carry_attributes(root, result)
    plan = make_fold_plan(result, root, before)
    if not inplace:
        own_tensors(result, model)
    result.plan = plan  # type: ignore[assignment]
    result.report = report  # type: ignore[assignment]
    for module in result.modules():
        if type(module) is nn.Module or isinstance(module, GraphModule):
            module.training = False  # a layer keeps the mode that the model's own eval() gives it
    return result
