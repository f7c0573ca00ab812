"""Online re-parameterization: branches folded at each forward from live parameters, so that one operator runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxrep import kernel as K
from fxrep.api import Examples
from fxrep.census import kind_of_emit
from fxrep.errors import FxrepError
from fxrep.evaluation import evaluate
from fxrep.fold import Folded, in_layout, run_emit
from fxrep.kernel import Leaf
from fxrep.lower import Emit
from fxrep.pipeline import Pipeline
from fxrep.plan import Decision
from fxrep.report import Report
from fxrep.rewrite import Rewriter
from fxrep.training.derivation import by_present_values, rewritten_as_it_trains, tell_of_norms
from fxrep.training.linear import Live, names_of
from fxrep.trees import named_modules

TRAINS = "branches are folded online as they train, and this network"
NORMS = "fold it by statistics that stay: eval() on the batch norm, whose scale and shift train all the same"


def online(model: nn.Module, example_inputs: Examples = None) -> nn.Module:
    """The branches of `model`, trained at about the cost of its deploy form.

    Each forward folds the live parameters into the single kernels, with autograd through the fold, and runs those: the
    parameters, their names and their gradients are those of the branches, whose activations are never stored (Hu et
    al., "Online Convolutional Re-parameterization", arXiv 2204.00826). What cannot be folded runs as it did: a batch
    norm in training mode, so only branches without one, or with frozen ones (in eval mode), gain.

    Args:
        model: in training mode; it is not touched.
        example_inputs: as for `reparameterize`.

    Returns:
        A `torch.fx.GraphModule` in training mode with a `Report` at `.report`; its state dict is that of the model.

    Raises:
        FxrepError: `model` is no module, or not in training mode.
    """
    return rewritten_as_it_trains(model, example_inputs, TRAINS, Live, _write)


def _write(pipeline: Pipeline) -> tuple[GraphModule, Report]:
    tell_of_norms(pipeline, NORMS)
    while refused := list(by_present_values(pipeline)):
        pipeline.decline(refused)
    result, report = pipeline.rewrite(writer=OnlineRewriter)
    _restore_owners(result, dict(named_modules(pipeline.traced.root)))
    _forget_in_state(result, {name for name, _ in pipeline.traced.root.named_buffers(remove_duplicate=False)})
    after = Counter(report.after)  # without the online layers, which are of none of the types that are counted
    after.update(kind_of_emit(m.emit, m.dims) for m in result.modules() if isinstance(m, OnlineLayer))
    return result, replace(report, after=dict(after))


def _restore_owners(result: GraphModule, modules: Mapping[str, nn.Module]) -> None:
    """Layers as they were: fx makes of those whose tensors are read holders of the read tensors alone, and leaves out
    those that nothing reads, such as the second name of a tied weight."""
    read = {str(n.target).rpartition(".")[0] for n in result.graph.find_nodes(op="get_attr")}
    there = dict(named_modules(result))
    for path, module in modules.items():
        if path and not list(module.children()) and (path in read or (path not in there and module.state_dict())):
            result.add_submodule(path, module)


def _forget_in_state(result: GraphModule, known: Collection[str]) -> None:
    """Constants of the fold's own, which are no part of the model's state dict."""
    for path, buffer in list(result.named_buffers(remove_duplicate=False)):
        if path not in known:
            owner, _, name = path.rpartition(".")
            result.get_submodule(owner).register_buffer(name, buffer, persistent=False)


class OnlineLayer(nn.Module):
    """An emit whose numbers are folded at each call from `tensors`, the live ones of its leaves in their order."""

    def __init__(self, emit: Emit, fill: float, dims: int) -> None:
        super().__init__()
        self.emit, self.fill, self.dims = emit, fill, dims
        self.order = {id(leaf.tensor): i for i, leaf in enumerate(distinct(emit))}

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:

        def read(leaf: Leaf) -> Tensor:
            return tensors[self.order[id(leaf.tensor)]]

        like = tensors[0] if tensors else x
        weight, bias = in_layout(self.emit, lambda kernel: evaluate(kernel, read, like))
        return run_emit(self.emit, weight, bias, self.fill, x, self.dims)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnlineLayer:
        return OnlineLayer(self.emit, self.fill, self.dims)  # it knows its leaves by identity, and owns none

    def __reduce__(self) -> Any:
        raise FxrepError("a network that folds online cannot be pickled; save its state_dict()")


def distinct(emit: Emit) -> list[Leaf]:
    """The emit's leaves, one for each tensor."""
    return list({id(leaf.tensor): leaf for leaf in K.leaves(*emit.kernels)}.values())


class OnlineRewriter(Rewriter):
    """Writes layers that are given live tensors instead of layers that own folded ones."""

    def _emit(self, folded: Folded, decision: Decision) -> Node:
        leaves, emit = distinct(folded.emit), folded.emit
        if not leaves and not emit.stores:
            return super()._emit(folded, decision)
        x = self._anchor(folded, decision)
        name = self._install(OnlineLayer(emit, folded.fill, decision.recipe.dims or 0), emit, decision)
        tensors = [self.new.get_attr(self._path(leaf.tensor, f"{name}_constant{i}")) for i, leaf in enumerate(leaves)]
        called: Node = self.new.call_module(name, (x, *tensors))
        self.ours.add(called)
        return called

    @cached_property
    def paths(self) -> dict[int, str]:
        return names_of(self.modules[""])

    def _path(self, tensor: Tensor, spare: str) -> str:
        """Where the tensor is; one that is no parameter and no buffer gets a place of its own."""
        if id(tensor) not in self.paths:
            holder = nn.Module()
            holder.register_buffer("value", tensor)
            self.modules[spare] = holder
            self.paths[id(tensor)] = f"{spare}.value"
        return self.paths[id(tensor)]
