"""What a network executes, counted below Python at each operator's dispatch; no graph and no module is believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from fxrep.zoo.kinds import KINDS

_NAMES = {
    "conv": "convolution _convolution",
    "linear": "addmm mm linear",
    "bn": "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
    "add": "add sub rsub",
    "mul": "mul div",
    "pool": """avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d
        _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d""",
    "view": """view _unsafe_view reshape _reshape_alias transpose t permute expand clone _to_copy squeeze unsqueeze
        alias detach contiguous""",
}
#: Which argument is the data: a weight may be computed too, and even by a batch norm (of ScaledStdConv).
_DATA: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "conv": lambda _: 0, "bn": lambda _: 0, "linear": lambda args: max(len(args) - 2, 0)
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in _NAMES.items() for name in names.split()}


@dataclass
class Step:
    """One executed operator, by the steps whose results it reads and those that read its own."""

    kind: str
    reads: list[int]
    read_by: list[int] = field(default_factory=list)
    pads: bool = False
    shifts: bool = False
    is_affine: bool = True


class Widened(TorchDispatchMode):
    """What a network makes or casts to float32 by name is float64: its truth is to be that of float64 throughout."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


class Calls(TorchDispatchMode):
    """Counts the operators that run on floating-point tensors, and their multiply-adds, and remembers who read what.

    A linear layer on a view that is not contiguous runs as a product and an addition of its bias: that is one linear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.macs = 0
        self._made_by: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.macs += flop_registry[packet](*args, **(kwargs or {}), out_val=result) // 2
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)][:1]
        if not made or not made[0].is_floating_point():
            return result
        name = packet.__name__.rstrip("_")
        kinds = ("add", "mul") if name == "addcmul" else (_KIND_OF.get(name, name),)
        for kind in kinds:
            self._note(kind, made[0], args, kwargs)
        return result

    def _note(self, kind: str, made: Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
        operands = [args[_DATA[kind](args)]] if kind in _DATA else tree_leaves((args, kwargs))
        reads = [self._made_by[t] for t in operands if isinstance(t, Tensor) and t in self._made_by]
        if kind == "add" and self._is_bias_of_linear(reads, args):
            kind = "view"
        step = Step(kind, reads)
        if kind == "conv":
            step.pads = bool(args[6]) or any(args[4])  # a transposed one takes no shift before it either
        if kind == "bn":
            step.shifts = _shifts(*args)
            step.is_affine = args[5] is not True  # else by statistics of its own input, as an instance norm runs
        for read in reads:
            self.steps[read].read_by.append(len(self.steps))
        self._made_by[made] = len(self.steps)
        self.steps.append(step)

    def _is_bias_of_linear(self, reads: list[int], args: tuple[Any, ...]) -> bool:
        bias = args[1] if len(args) > 1 else None
        is_vector = isinstance(bias, nn.Parameter) and bias.ndim == 1
        return is_vector and len(reads) == 1 and self._source(reads[0]).kind == "linear"

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(step.kind for step in self.steps)
        return {kind: found[kind] for kind in KINDS}

    def _source(self, index: int) -> Step:
        """The step behind views that nobody else reads."""
        step = self.steps[index]
        while step.kind == "view" and len(step.reads) == 1 and len(step.read_by) <= 1:
            step = self.steps[step.reads[0]]
        return step

    def unfolded(self) -> list[str]:
        """The batch norms that a neighbour could have taken: of each, on which side that neighbour stands."""
        sides = (self._side(step) for step in self.steps if step.kind == "bn" and step.is_affine)
        return [side for side in sides if side]

    def _side(self, bn: Step) -> str:
        before = self._source(bn.reads[0]) if bn.reads else None
        if before is not None and before.kind in ("conv", "linear") and len(before.read_by) == 1:
            return f"after {before.kind}"
        after = [self.steps[i] for i in self._readers(bn)]
        takes = [s.kind == "linear" or (s.kind == "conv" and not (s.pads and bn.shifts)) for s in after]
        return f"before {after[0].kind}" if after and all(takes) else ""

    def _readers(self, step: Step) -> list[int]:
        """Who reads a value, or a view of it."""
        found: list[int] = []
        for i in step.read_by:
            found += self._readers(self.steps[i]) if self.steps[i].kind == "view" else [i]
        return found


def _shifts(_x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> bool:
    """Whether BN(0) = β − μγ/σ is anything but zero."""
    if mean is None or var is None:
        return True
    gain = (var + rest[-1]).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * gain
    return bool(shift.abs().max() > 0)
