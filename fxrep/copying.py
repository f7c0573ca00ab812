"""A model's module objects anew, around the same parameters: what traces and rewrites it cannot touch the original."""

from __future__ import annotations

import copy
from collections import OrderedDict
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.errors import FxrepError
from fxrep.trees import COMMON, first_names, named_modules

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip
#: Methods by which a class says how its objects are copied; nn.Module's own do nothing but restore attributes.
OWN_COPY = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__", "__getnewargs__",
            "__getnewargs_ex__")  # fmt: skip

ATOMS = frozenset((bool, int, float, complex, str, bytes, type(None), type))
STORES = frozenset((dict, OrderedDict, set))


def structural_copy(model: nn.Module) -> nn.Module:
    """New module objects around the *same* parameters and hooks, in eval mode: tracing it cannot touch the original."""
    memo: dict[int, Any] = {}
    modules = [m for _, m in first_names(named_modules(model))]
    for module in modules:
        memo.update({id(p): p for p in module._parameters.values() if p is not None})
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        memo.update({id(h): h for kind in hooks if kind for h in kind.values()})
    try:
        copied = _copied(model, memo).eval()
    except Exception as error:
        name = type(model).__name__
        raise FxrepError(
            f"{name} cannot be copied ({error}); fxrep works on a copy, to leave your model as it is. "
            "Remove what cannot be copied (open files, locks, generators) from the module's attributes."
        ) from error
    for old, new in zip(modules, (m for _, m in first_names(named_modules(copied))), strict=True):
        if not _is_plain(type(old)):
            _complete(old, new)
    return copied


def _complete(old: nn.Module, new: nn.Module) -> None:
    """What a module that copies itself loses by it: a GraphModule its plain attributes and its hooks."""
    for name, attribute in vars(old).items():
        if not isinstance(attribute, torch._C.ScriptMethod):  # a program's method runs on the module it is of
            vars(new).setdefault(name, attribute)
    for name in HOOKS:
        vars(new)[name].update(vars(old)[name])


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, quicker on what module trees are made of: it does not ask each object how to copy it. It copies
    tensors that were computed too."""
    kind = type(value)
    if kind in ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    made: Any
    if kind is dict or kind is OrderedDict:
        made = memo[id(value)] = kind()
        if value:
            made.update([(_copied(k, memo), _copied(v, memo)) for k, v in value.items()])
    elif kind is Tensor and not (value.is_leaf and value.requires_grad):
        made = memo[id(value)] = value.detach().clone()
    elif kind is list:
        made = memo[id(value)] = []
        made.extend([_copied(entry, memo) for entry in value])
    elif kind is tuple:
        made = value if ATOMS.issuperset(map(type, value)) else tuple([_copied(entry, memo) for entry in value])
        made = value if all(map(is_, made, value)) else made
    elif kind is set and ATOMS.issuperset(map(type, value)):
        made = memo[id(value)] = value.copy()
    elif isinstance(value, nn.Module) and _is_plain(kind):
        made = memo[id(value)] = object.__new__(kind)
        _copy_attributes(vars(value), vars(made), memo)
    else:
        made = copy.deepcopy(value, memo)
    return made


def _copy_attributes(attributes: dict[str, Any], into: dict[str, Any], memo: dict[int, Any]) -> None:
    for name, value in attributes.items():
        kind = type(value)
        if kind in ATOMS:
            into[name] = value
        elif kind in STORES and not value and name in COMMON:  # most of what is in a module: no hooks, no buffers, …
            into[name] = kind()
        else:
            into[name] = _copied(value, memo)


_PLAIN: dict[type, bool] = {}


def _is_plain(kind: type) -> bool:
    """Whether the objects of a module class are copied attribute by attribute."""
    if kind not in _PLAIN:
        _PLAIN[kind] = all(
            getattr(kind, m, None) is getattr(nn.Module, m, None) or _is_torchs(kind, m) for m in OWN_COPY
        )
    return _PLAIN[kind]


def _is_torchs(kind: type, method: str) -> bool:
    """Whether it is the `__setstate__` by which a layer of torch.nn restores what its older versions lacked."""
    return method == "__setstate__" and str(getattr(kind, method).__module__).startswith("torch.nn.modules.")
