"""What Python's builtins say of a value while it is traced.

A proxy is no tensor and has every attribute, so that `isinstance` and `hasattr` in a forward would decide by what only
tracing is made of. They are answered for the value; where that is not known, the forward is not traced.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

_is, _has = builtins.isinstance, builtins.hasattr
#: Modules that ask about proxies as such.
_INSIDE = ("torch.fx.", "torch.nn.parameter.", "torch.nn.modules.module.", "torch.utils.", "torch.overrides.", "fxrep.")
#: Those of them that ask most often: they keep Python's own functions, so that it costs them nothing.
_OFTEN = """
    torch.fx.graph torch.fx.node torch.fx.proxy torch.fx._symbolic_trace torch.overrides torch.utils._pytree
    torch.nn.modules.module torch.nn.parameter
    fxrep.tracer fxrep.recorder fxrep.proxies fxrep.readers.registry fxrep.readers.walk
"""


@contextmanager
def asked() -> Iterator[None]:
    """While it is entered, `max` and `min` of proxies are recorded, and `isinstance` and `hasattr` see their values."""
    changed = {"max": _recording(max), "min": _recording(min), "isinstance": _isinstance, "hasattr": _hasattr}
    before = {name: getattr(builtins, name) for name in changed}
    for name, function in changed.items():
        setattr(builtins, name, function)
    inside = [vars(sys.modules[name]) for name in _OFTEN.split()]
    for names in inside:
        names.update(isinstance=_is, hasattr=_has)  # a module's own names go before the builtins
    try:
        yield
    finally:
        for names in inside:
            names.pop("isinstance", None)
            names.pop("hasattr", None)
        for name, function in before.items():
            setattr(builtins, name, function)


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        entries = args[0] if len(args) == 1 and _is(args[0], (tuple, list)) else args
        proxy = next((e for e in entries if _is(e, fx.Proxy)), None)
        if proxy is None or kwargs:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, {})

    return recorded


def _isinstance(value: Any, kinds: Any, /) -> bool:
    if _is(value, kinds):
        return True
    if not _is(value, fx.Proxy) or _is_inside(sys._getframe(1).f_globals):
        return False
    return issubclass(value.tracer.kind(value), kinds)


def _hasattr(value: Any, name: str, /) -> bool:
    if not _is(value, fx.Proxy) or _is_inside(sys._getframe(1).f_globals):
        return _has(value, name)
    return _has(value.tracer.kind(value), name)


def _is_inside(names: dict[str, Any]) -> bool:
    return f"{names.get('__name__', '')}.".startswith(_INSIDE)
