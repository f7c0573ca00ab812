"""Whether a folded kernel is linear in the parameters that train, so that their sum can be trained in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxrep import kernel as K
from fxrep.errors import Illegal
from fxrep.evaluation import evaluate
from fxrep.kernel import Kernel, Leaf, Map, topological
from fxrep.lower import Recipe

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensor]
PRODUCTS = (K.ScaleRows, K.ScaleColumns, K.Compose, K.Contract)  # bilinear in their two operands
TOLERANCE = 1e-9
STEP = 1e-6  # of central differences, which are then good to some 1e-8


class Live:
    """Raises Illegal for a recipe in which autograd would not see what trains: a parametrized weight, a `detach`."""

    def __init__(self, root: nn.Module) -> None:
        self.names = names_of(root)
        self.maps: dict[int, tuple[Map, bool]] = {}

    def __call__(self, recipe: Recipe) -> None:
        for kernel in (k for e in recipe.emits for k in e.kernels if k is not None):
            trains: dict[int, bool] = {}
            for node in topological((kernel,)):
                varying = [o for o in node.operands if trains[id(o)]]
                trains[id(node)] = bool(varying) or (isinstance(node, Leaf) and node.tensor.requires_grad)
                self.check(node, varying)

    def check(self, node: Kernel, varying: Sequence[Kernel]) -> None:
        """Of one node of a kernel, whose operands `varying` depend on what trains."""
        if isinstance(node, Leaf) and node.tensor.requires_grad and not node.tensor.is_leaf:
            raise Illegal("parameters-not-linear", "a weight is computed by a parametrization, outside of any forward")
        if isinstance(node, Map) and varying and not self._passes(node, varying):
            fact = f"a weight is computed from {self.told(node)} by {self.unfit}"
            raise Illegal("parameters-not-linear", fact)

    unfit = "a function that hides it from autograd"

    def fits(self, function: Function, a: Tensors, b: Tensors) -> bool:
        return has_its_derivative(function, a, b)

    def told(self, kernel: Kernel) -> str:
        leaves = [leaf.tensor for leaf in K.leaves(kernel) if leaf.tensor.requires_grad]
        return " + ".join(dict.fromkeys(self.names.get(id(t), "a tensor") for t in leaves))

    def _passes(self, node: Map, varying: Sequence[Kernel]) -> bool:
        if id(node) not in self.maps:
            self.maps[id(node)] = node, self.fits(*_on_random_numbers(node, varying))
        return self.maps[id(node)][1]


class Linear(Live):
    """Raises Illegal for a recipe whose kernels are not of the form Σ L_i(W_i) + c, with constant linear L_i."""

    unfit = "a function that is not linear in it"

    def fits(self, function: Function, a: Tensors, b: Tensors) -> bool:
        return is_linear(function, a, b)

    def check(self, node: Kernel, varying: Sequence[Kernel]) -> None:
        super().check(node, varying)
        if isinstance(node, PRODUCTS) and len(varying) == 2:
            fact = f"{self.told(varying[0])} and {self.told(varying[1])} both train and are multiplied"
            raise Illegal("parameters-not-linear", fact)


def names_of(root: nn.Module) -> dict[int, str]:
    """Qualified names by the identity of parameters and buffers."""
    named = (*root.named_buffers(remove_duplicate=False), *root.named_parameters(remove_duplicate=False))
    return {id(tensor): name for name, tensor in named}


def _on_random_numbers(node: Map, varying: Sequence[Kernel]) -> tuple[Function, Tensors, Tensors]:
    """The node as a function of its varying operands, the others being constants; and two random places."""
    generator = torch.Generator().manual_seed(0)
    varies = [any(o is v for v in varying) for o in node.operands]
    fixed = [None if v else evaluate(o) for o, v in zip(node.operands, varies, strict=True)]
    device = next((leaf.tensor.device for leaf in K.leaves(node)), torch.device("cpu"))
    shapes = [o.shape for o, v in zip(node.operands, varies, strict=True) if v]

    def function(*values: Tensor) -> Tensor:
        given = iter(values)
        return node._compute(*(next(given) if f is None else f for f in fixed))

    a, b = (
        tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes) for _ in range(2)
    )
    return function, a, b


def derivative(function: Callable[..., Any], at: Tensors, along: Tensors) -> tuple[Any, Any]:
    """The value, and the derivative along a direction."""
    value, slope = torch.func.jvp(function, at, along)  # type: ignore[misc]
    return value, slope


def is_linear(function: Function, a: Tensors, b: Tensors) -> bool:
    """f(a + b) + f(0) = f(a) + f(b), and autograd says so too: its derivative along a is f(a) - f(0)."""
    zero = tuple(torch.zeros_like(t) for t in a)
    both = tuple(x + y for x, y in zip(a, b, strict=True))
    at_zero, slope = derivative(function, zero, a)
    sums = function(*both) + at_zero, function(*a) + function(*b)
    return _close(*sums, TOLERANCE) and _close(slope, function(*a) - at_zero, TOLERANCE)


def has_its_derivative(function: Function, a: Tensors, b: Tensors) -> bool:
    """Whether autograd's derivative at a, along b, is that of the function."""
    _, slope = derivative(function, a, b)
    ahead, behind = (function(*(x + sign * STEP * y for x, y in zip(a, b, strict=True))) for sign in (1, -1))
    return _close(slope, (ahead - behind) / (2 * STEP), 1e-5)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(((a - b).abs() <= tolerance * b.abs().max().clamp_min(1e-6)).all())
