"""MODEL on the command line: torchvision, timm, transformers, FILE.py:CALLABLE or MODULE:CALLABLE → a module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fxrep.cli.common import Input, summary
from fxrep.errors import Unusable, did_you_mean, no_file

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

MODEL_HELP = """\
MODEL is one of
  torchvision:NAME     a model of torchvision.models, such as torchvision:resnet50
  timm:NAME            a model of timm, such as timm:repvgg_a0
  transformers:NAME    of transformers the NAMEModel as its NAMEConfig has it, such as transformers:ResNet
  FILE.py:CALLABLE     from a file, such as nets/mine.py:Net
  MODULE:CALLABLE      from an importable module, such as mypackage.nets:build
CALLABLE is an nn.Module class or a function that gives a module, callable without arguments, or a module.
Weights are random: nothing is downloaded.
"""


FORMS = "torchvision:NAME, timm:NAME or path/or.module:callable"


def load(model: str) -> nn.Module:
    scheme, _, name = model.partition(":")
    if name and scheme in ZOOS:
        return ZOOS[scheme](name)
    source, _, name = model.rpartition(":")
    if not (source and name):
        raise Unusable(f"{model!r} names no model: {_instead(model)}")
    module = load_file(Path(source)) if source.endswith(".py") else load_module(source)
    return as_module(find(module, name, source), model)


def _instead(model: str) -> str:
    if model.endswith(".py"):
        return f"write {model}:NAME of a class or function in it"
    if Path(model).is_file():
        return "name the network whose weights it holds; fxrep convert takes it as --weights"
    return f"write {FORMS}"


def load_torchvision(name: str) -> nn.Module:
    models = load_extra("torchvision.models")
    check_known(name, models.list_models(), "torchvision")
    builder = models.get_model_builder(name)
    # Detection and segmentation models download a backbone unless told not to; the others know no such argument.
    known = inspect.signature(builder).parameters
    nothing = {key: None for key in ("weights", "weights_backbone") if key in known}
    return build(lambda: builder(**nothing), f"torchvision:{name}")


def load_timm(name: str) -> nn.Module:
    timm = load_extra("timm")
    check_known(name.partition(".")[0], timm.list_models(), "timm")
    return build(lambda: timm.create_model(name, pretrained=False), f"timm:{name}")


def load_transformers(name: str) -> nn.Module:
    transformers = load_extra("transformers", "zoo")
    ending = "Config"
    known = [key.removesuffix(ending) for key in dir(transformers) if key.endswith(ending)]
    check_known(name, known, "transformers")
    config, kind = (getattr(transformers, f"{name}{what}") for what in (ending, "Model"))
    return build(lambda: kind(config()), f"transformers:{name}")


ZOOS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": load_torchvision, "timm": load_timm, "transformers": load_transformers
}  # fmt: skip


def load_extra(module: str, extra: str = "vision") -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision beside a torch that it was not built for raises RuntimeError
        package = module.partition(".")[0]
        raise Unusable(f'{package} cannot be imported ({error}): pip install "fxrep[{extra}]"') from error


def check_known(name: str, known: Iterable[str], zoo: str) -> None:
    known = list(known)
    if name not in known:
        hint = did_you_mean(name, known) or f": the list_models() of {zoo} names them all"
        raise Unusable(f"{zoo} has no model {name!r}{hint}")


def load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise Unusable(no_file(path))
    name = f"_fxrep_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE` does: the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Unusable(broken_import(str(path), f"python {path}", error)) from error
    return module


def load_module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # as `python -m` does, and the installed command does not
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            hint = did_you_mean(name, ZOOS) or f": write {FORMS}"
            raise Unusable(f"{name!r} is neither torchvision, timm nor an importable module{hint}") from error
        raise Unusable(broken_import(name, f"python -c 'import {name}'", error)) from error


def broken_import(name: str, command: str, error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, SyntaxError) else f" ({frame.filename}, line {frame.lineno})"
    return f"importing {name} failed: {summary(error)}{place}; `{command}` shows the whole traceback"


def find(module: ModuleType, name: str, source: str) -> object:
    try:
        return attrgetter(name)(module)
    except AttributeError as error:
        names = [key for key, value in vars(module).items() if callable(value)]
        hint = did_you_mean(name, names) or ": name a module class, a function that gives a module, or a module"
        raise Unusable(f"{source} has no {name!r}{hint}") from error


def as_module(found: object, model: str) -> nn.Module:
    from torch import nn

    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise Unusable(f"{model} is of type {type(found).__name__}: name an nn.Module, or what gives one when called")
    missing = required_arguments(found)
    if missing:
        wants = ", ".join(missing)
        raise Unusable(f"{model} needs arguments ({wants}): name a function without any that calls it with yours")
    made = build(found, model)
    if not isinstance(made, nn.Module):
        raise Unusable(f"calling {model} gives a value of type {type(made).__name__}: it must give an nn.Module")
    return made


def required_arguments(function: Callable[..., object]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have no signature: the call will tell
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def build(function: Callable[..., Any], model: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise Unusable(f"building {model} failed: {summary(error)}; mend what it calls, or name another") from error


def example_inputs(model: nn.Module, inputs: Sequence[Input] | None) -> tuple[Tensor, ...] | None:
    """Random tensors that the model is seen to accept."""
    import torch

    if not inputs:
        return None
    floats = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    examples = tuple(_drawn(given, floats, generator) for given in inputs)
    try:
        with torch.no_grad():
            model.eval()(*examples)
    except Exception as error:
        text = " --input ".join(map(str, inputs))
        raise Unusable(
            f"the model does not run on --input {text}: {summary(error)}; give a shape that fits, and of integers the "
            "dtype too, such as 1,128:int64"
        ) from error
    return examples


def _drawn(given: Input, like: Tensor, generator: Generator) -> Tensor:
    """Normal numbers in the parameters' dtype, or zeros and ones, which are indices, masks and kinds of any network."""
    import torch

    dtype = getattr(torch, given.dtype) if given.dtype else like.dtype
    if dtype.is_floating_point:
        drawn = torch.randn(given.sizes, generator=generator)
    else:
        drawn = torch.randint(2, given.sizes, generator=generator)
    return drawn.to(like.device, dtype)
