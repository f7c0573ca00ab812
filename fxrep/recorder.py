"""What records calls of `torch.fx` as nodes, and which kind of proxy stands for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxrep.proxies import IS_CONSTANT, VALUE, ConstantProxy, Pieces, Proxy, count_of_pieces, is_constant


class Stack(OrderedDict[str, Any]):
    """The modules that are being called. fx would copy it for every node; those between two calls share a copy."""

    copied: OrderedDict[str, Any] | None = None

    def shared(self) -> OrderedDict[str, Any]:
        if self.copied is None:
            self.copied = OrderedDict(self)
        return self.copied

    def __bool__(self) -> bool:
        """Whether fx has to copy it."""
        return False

    def __setitem__(self, name: str, module: Any) -> None:
        self.copied = None
        super().__setitem__(name, module)

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        self.copied = None
        return super().popitem(last)


class Recorder(fx.Tracer):
    """A tracer that sees writes; a pickled result is traced again by it when it is loaded."""

    #: the parameters and buffers of the root by name, before their reading is recorded
    tensors: Mapping[str, Tensor] = {}

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Node:
        """With its arguments set afterwards: given at once, fx searches them for sizes that only Dynamo traces."""
        node = super().create_node(kind, target, (), {}, *rest, **options)
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        if isinstance(self.module_stack, Stack) and len(self.module_stack):
            node.meta["nn_module_stack"] = self.module_stack.shared()
        return node

    def proxy(self, node: fx.Node) -> Proxy:
        if node.op == "get_attr" and str(node.target) in self.tensors:
            node.meta[VALUE] = self.tensors[str(node.target)]
        node.meta[IS_CONSTANT] = is_constant(node)
        if count_of_pieces(node):
            return Pieces(node, self)
        return (ConstantProxy if node.meta[IS_CONSTANT] else Proxy)(node, self)
