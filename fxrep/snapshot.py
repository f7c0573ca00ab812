"""What a forward writes into its modules while it is traced: seen, undone, and the module named."""

from __future__ import annotations

from collections.abc import Iterator
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrep.trees import first_names, named_modules, own_attributes

CONSTANT = "_tensor_constant"  # how fx names the tensors that it stows away on the root


class Snapshot:
    """The state of a module tree before a trace."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = [
            (name, m) for name, m in first_names(named_modules(root)) if not isinstance(m, torch.jit.ScriptModule)
        ]
        self.attributes = {name: dict(vars(module)) for name, module in self.modules}
        self.stores = {name: {s: dict(vars(module)[s]) for s in _STORES} for name, module in self.modules}
        self.contents = {name: dict(_containers(module)) for name, module in self.modules}
        self.tensors = {name: [(t, _version(t), t.detach().clone()) for t in _buffers(m)] for name, m in self.modules}
        self.random = torch.get_rng_state()

    def restore(self) -> str | None:
        """Undoes what was written since, and names the first module whose forward wrote."""
        torch.set_rng_state(self.random)
        wrote = [name for name, module in self.modules if self._restore(name, module)]
        return wrote[0] if wrote else None

    def _restore(self, name: str, module: nn.Module) -> bool:
        steps = (
            self._restore_contents(name, module),
            self._restore_tensors(name),
            self._restore_attributes(name, module),
        )
        return any(steps)

    def _restore_attributes(self, name: str, module: nn.Module) -> bool:
        before, now = self.attributes[name], vars(module)
        changed = [] if _same_entries(now, before) else [k for k in now if k not in before or now[k] is not before[k]]
        for key in changed:
            if key in before:
                now[key] = before[key]
            elif not key.startswith(CONSTANT):
                del now[key]
        for store in _STORES:
            was = self.stores[name][store]
            if not _same_entries(now[store], was):
                now[store] = was
                changed.append(store)
        return any(not key.startswith(CONSTANT) for key in changed)

    def _restore_contents(self, name: str, module: nn.Module) -> bool:
        """Lists, dicts and sets that the module keeps. A dict that was given constants alone was a cache."""
        wrote = False
        for key, before in self.contents[name].items():
            container = vars(module).get(key)
            if not isinstance(container, type(before)) or _same_entries(container, before):
                continue
            wrote |= not _is_cached(container, before)
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        return wrote

    def _restore_tensors(self, name: str) -> bool:
        written = [(tensor, old) for tensor, version, old in self.tensors[name] if _version(tensor) != version]
        with torch.no_grad():
            for tensor, old in written:
                tensor.copy_(old)
        return bool(written)


_STORES = ("_buffers", "_parameters")


def _containers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((k, v.copy()) for k, v in own_attributes(module) if isinstance(v, (list, dict, set)))


def _buffers(module: nn.Module) -> Iterator[Tensor]:
    """Buffers and plain tensors; parameters are proxies while they are traced."""
    yield from (t for t in module._buffers.values() if t is not None)
    yield from (v for _, v in own_attributes(module) if isinstance(v, Tensor))


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
