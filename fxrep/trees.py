"""Module trees, walked at once: `nn.Module.named_modules` passes each module up through all that enclose it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

#: What every module has, whatever it is.
COMMON = frozenset(vars(nn.Module()))


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under every name that it has, each before what is inside."""
    found: list[tuple[str, nn.Module]] = []
    _walk("", model, found)
    return found


def _walk(name: str, module: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
    found.append((name, module))
    for inner, child in module._modules.items():
        if child is not None:
            _walk(joined(name, inner), child, found)


def joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def first_names(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Each module once, under the first of its names."""
    first: dict[int, tuple[str, nn.Module]] = {}
    for name, module in modules:
        first.setdefault(id(module), (name, module))
    return list(first.values())


def parameters(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """By dotted names, each under every name that it has."""
    return {joined(p, n): t for p, m in modules for n, t in m._parameters.items() if t is not None}


def buffers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """By dotted names, each under every name that it has."""
    return {joined(p, n): t for p, m in modules for n, t in m._buffers.items() if t is not None}


def on_meta(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name of a tensor without numbers."""
    return next((name for name, tensor in tensors.items() if tensor.is_meta), None)


def own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What the module keeps besides parameters, buffers, modules and what every module has."""
    return iter([entry for entry in vars(module).items() if entry[0] not in COMMON])
