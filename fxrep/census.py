"""How many calls of each kind a graph executes; modules never called do not count."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fxrep.lower import Emit, Recipe
from fxrep.plan import Plan
from fxrep.readers import canonical, registered
from fxrep.readers.normalization import NATIVE_BATCH_NORMS


def _read_by(*names: str) -> frozenset[object]:
    """Every spelling that the readers of these names take."""
    return frozenset(target for target, reader in registered().items() if reader.__name__ in names)


aten = torch.ops.aten
MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (_ConvNd,),
    "linear": (nn.Linear,),
    "bn": (_BatchNorm,),
    "pool": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
}
FUNCTIONS: dict[str, frozenset[object]] = {
    "conv": _read_by("read_functional_conv", "read_functional_transposed_conv", "read_aten_convolution"),
    "linear": _read_by("read_functional_linear", "read_addmm") | {torch.mm, "mm"},
    "bn": _read_by("read_functional_batchnorm") | {first.target for first in NATIVE_BATCH_NORMS},
    "add": _read_by("read_add", "read_sub", "read_rsub"),
    "mul": _read_by("read_mul", "read_div", "read_neg", "read_addcmul"),
    "pool": _read_by("read_functional_avg_pool")
    | {F.max_pool1d, F.max_pool2d, F.max_pool3d, aten.max_pool2d_with_indices.default},
}
KINDS = ("conv", "linear", "bn", "add", "mul", "pool")
KINDS_OF = {target: [k for k in KINDS if target in FUNCTIONS[k]] for target in frozenset().union(*FUNCTIONS.values())}


def census(graph: Graph, modules: Mapping[str, nn.Module], numbers: Collection[str] = ()) -> dict[str, int]:
    """Calls by kind; `numbers` names nodes that compute sizes, whose additions are none of the network's."""
    counts = dict.fromkeys(KINDS, 0)
    for node in graph.nodes:
        if node.name not in numbers:
            for kind in kinds(node, modules):
                counts[kind] += 1
    return counts


def census_of_module(module: nn.Module) -> dict[str, int]:
    """What is in a module that is called as a whole, each layer counted once."""
    inside = list(module.modules())
    return {kind: sum(isinstance(m, MODULES.get(kind, ())) for m in inside) for kind in KINDS}


def planned(
    graph: Graph, modules: Mapping[str, nn.Module], plan: Plan, numbers: Mapping[str, object]
) -> dict[str, int]:
    """The census that the graph will have once the plan is carried out."""
    counts = dict.fromkeys(KINDS, 0)
    for node in graph.nodes:
        if node.name not in plan.removed and node.name not in plan.decisions and node.name not in numbers:
            for kind in kinds(node, modules):
                counts[kind] += 1
    for decision in plan.decisions.values():
        for kind in _recipe_kinds(decision.recipe):
            counts[kind] += 1
    return counts


def _recipe_kinds(recipe: Recipe) -> list[str]:
    terms = [kind_of_emit(e, recipe.dims) for e in recipe.emits if not e.is_pass]
    return terms + ["add" for part in recipe.parts for _ in part[1:]]


def kind_of_emit(emit: Emit, dims: int | None) -> str:
    layer = "conv" if dims else "linear"
    return layer if emit.operator else "add" if emit.is_shift else "mul"


def kinds(node: Node, modules: Mapping[str, nn.Module]) -> list[str]:
    """The kinds of what one node calls."""
    if node.op == "call_module":  # a module that was kept whole counts with everything in it
        module = modules[str(node.target)]
        inside = module.modules() if module._modules else (module,)
        return [kind for m in inside for kind, types in MODULES.items() if isinstance(m, types)]
    return KINDS_OF.get(canonical(node.target), []) if node.op.startswith("call") else []
