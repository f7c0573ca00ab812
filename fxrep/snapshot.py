"""What a forward writes into its modules while it is traced: seen, undone, and the module named."""

from __future__ import annotations

from collections.abc import Iterable
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.trees import own_attributes

CONSTANT = "_tensor_constant"  # how fx names the tensors that it stows away on the root


class Snapshot:
    """The state of a module tree before a trace."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.modules = [(name, m, _Before(m)) for name, m in modules if not isinstance(m, torch.jit.ScriptModule)]
        self.random = torch.get_rng_state()

    def restore(self) -> str | None:
        """Undoes what was written since, and names the first module whose forward wrote."""
        torch.set_rng_state(self.random)
        wrote = [name for name, module, before in self.modules if before.restore(module)]
        return wrote[0] if wrote else None


class _Before:
    """What one module kept."""

    def __init__(self, module: nn.Module) -> None:
        own = list(own_attributes(module))
        self.attributes = dict(vars(module))
        self.stores = [(store, dict(self.attributes[store])) for store in _STORES]
        self.contents = [(name, value.copy()) for name, value in own if isinstance(value, (list, dict, set))]
        tensors = [*module._buffers.values(), *(value for _, value in own if isinstance(value, Tensor))]
        self.tensors = [(t, _version(t), t.detach().clone()) for t in tensors if t is not None]  # parameters: proxies

    def restore(self, module: nn.Module) -> bool:
        steps = self._restore_contents(module), self._restore_tensors(), self._restore_attributes(module)
        return any(steps)

    def _restore_attributes(self, module: nn.Module) -> bool:
        before, now = self.attributes, vars(module)
        changed = [] if _same_entries(now, before) else [k for k in now if k not in before or now[k] is not before[k]]
        for key in changed:
            if key in before:
                now[key] = before[key]
            elif not key.startswith(CONSTANT):
                del now[key]
        for store, was in self.stores:
            if not _same_entries(now[store], was):
                now[store] = was
                changed.append(store)
        return any(not key.startswith(CONSTANT) for key in changed)

    def _restore_contents(self, module: nn.Module) -> bool:
        """Lists, dicts and sets that the module keeps. A dict that was given constants alone was a cache."""
        wrote = False
        for key, before in self.contents:
            container = vars(module).get(key)
            if not isinstance(container, type(before)) or _same_entries(container, before):
                continue
            wrote |= not _is_cached(container, before)
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        return wrote

    def _restore_tensors(self) -> bool:
        written = [(tensor, old) for tensor, version, old in self.tensors if _version(tensor) != version]
        for tensor, old in written:
            with torch.no_grad():
                tensor.copy_(old)
        return bool(written)


_STORES = ("_buffers", "_parameters")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same_entries(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        if all(map(is_, now.values(), before.values())) and all(map(eq, now, before)):
            return True
        return all(k in before and before[k] is v for k, v in now.items())
    if isinstance(now, set):
        return bool(now == before)
    return all(a is b for a, b in zip(now, before, strict=True))


def _is_cached(now: Any, before: Any) -> bool:
    """Whether only entries were added, and only such as do not depend on the network's input."""
    if not isinstance(now, dict) or any(k not in now or now[k] is not v for k, v in before.items()):
        return False
    return all(isinstance(v, fx.Proxy) and _is_constant(v.node) for k, v in now.items() if k not in before)


def _is_constant(node: fx.Node) -> bool:
    todo = [node]
    while todo:
        current = todo.pop()
        if current.op == "placeholder" or (not current.all_input_nodes and current.op != "get_attr"):
            return False
        todo.extend(current.all_input_nodes)
    return True
