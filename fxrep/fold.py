"""From a recipe to numbers and layers: kernels are evaluated once, in float64, and cast once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.errors import Illegal
from fxrep.evaluation import Doubles, evaluate
from fxrep.lower import Emit, Recipe, needs_explicit_pad
from fxrep.parts import Anchor
from fxrep.refolding import columns_first
from fxrep.rows import blocks
from fxrep.sketch import gathered, rows_sketched, sketched
from fxrep.trees import parameters

CONV_LAYERS: dict[tuple[int, bool], type[nn.Module]] = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Like:
    """What the new tensors should be like: those that they replace."""

    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    trainable: bool


@dataclass(frozen=True, eq=False)
class Folded:
    """An emit with its numbers: `weight` in the layout of its torch layer, or a scale, cast once from float64.

    `proof` is what the certificate runs, in float64: a scale and its shift as they are, an operator as its sketch.
    """

    emit: Emit
    weight: Tensor | None
    bias: Tensor | None
    fill: float
    like: Like
    proof: tuple[Tensor | None, Tensor | None] = (None, None)


#: Gives the memory, in the layout of a kernel, into which the weight of an emit is folded.
Into = Callable[[Emit, Like], Tensor]


def anew(emit: Emit, like: Like) -> Tensor:
    assert emit.operator is not None
    return torch.empty(emit.operator.weight.shape, dtype=like.dtype, device=like.device)


def nowhere(emit: Emit, like: Like) -> Tensor:
    """For a fold that is proved, and forgotten."""
    assert emit.operator is not None
    return torch.empty(emit.operator.weight.shape, dtype=like.dtype, device="meta")


def fold(emit: Emit, doubles: Doubles, default: Like | None = None, into: Into = anew) -> Folded:
    """Evaluates the emit's kernels; `default` is what weights without any parameter in them should be like.

    A block of rows is written `into` a weight's memory once what it is computed from was read: the same rows of large
    tensors of its shape, and all of every other. The bias is computed before.

    Raises Illegal where the parameters live on several devices, or where there are none and no default.
    """
    like = _like([leaf.tensor for leaf in K.leaves(*emit.kernels)], default) if emit.stores or emit.is_pad else default
    if like is None:
        raise Illegal("dtype-unknown", "its weights would be constants, and no parameter says of which dtype")
    fill = emit.operator.fill.value if emit.operator and isinstance(emit.operator.fill, K.Constant) else 0.0
    with torch.no_grad():
        if emit.operator is None:
            w, b = (None if k is None else evaluate(k, doubles).to(like.device) for k in emit.kernels)
            return Folded(emit, _cast(w, like), _cast(b, like), fill, like, (w, b))
        return _folded_operator(emit, emit.operator, doubles, fill, like, into(emit, like))


def _folded_operator(
    emit: Emit, operator: AffineConv, doubles: Doubles, fill: float, like: Like, weight: Tensor
) -> Folded:
    channels, groups = operator.out_channels, operator.groups
    bias = None if operator.bias is None else evaluate(operator.bias, doubles).to(like.device)
    sketch = torch.zeros((groups, *operator.weight.shape[1:]), dtype=torch.float64, device=like.device)
    for start, block in blocks(operator.weight, doubles):
        block = block.to(like.device)
        weight[start : start + len(block)].copy_(block)
        rows_sketched(block, start, channels, sketch)
        del block  # its memory, which is in the cache, is that of the next
    summed = None if bias is None else sketched(bias, groups, -1, channels)
    if operator.transposed:
        weight, sketch = (columns_first(w, groups) for w in (weight, sketch))
    if weight.ndim == 4 and like.channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return Folded(emit, weight, _cast(bias, like), fill, like, (sketch, summed))


def _cast(value: Tensor | None, like: Like) -> Tensor | None:
    """A tensor of its own in its final dtype: the one rounding of a fold."""
    return None if value is None else value.to(like.dtype, copy=True)


def in_layout(emit: Emit, number: Callable[[K.Kernel], Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The weight (or gain) and the bias of an emit, in the layout of its torch layer."""
    weight, bias = (None if k is None else number(k) for k in emit.kernels)
    if weight is not None and emit.operator is not None and emit.operator.transposed:
        weight = columns_first(weight, emit.operator.groups)
    return weight, bias


def like_of(modules: Iterable[tuple[str, nn.Module]]) -> Like | None:
    """The dtype and device of the floating-point parameters of modules, if all have one."""
    kinds = {(p.dtype, p.device) for p in parameters(modules).values() if p.is_floating_point()}
    return Like(*next(iter(kinds)), channels_last=False, trainable=False) if len(kinds) == 1 else None


def _like(tensors: list[Tensor], default: Like | None) -> Like | None:
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise Illegal("device-mismatch", f"the parameters live on {', '.join(sorted(map(str, devices)))}")
    if not tensors:
        return default
    first = max(tensors, key=lambda t: t.ndim)  # the convolution's weight, if there is one
    last = any(
        t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors
    )
    return Like(first.dtype, first.device, last, any(t.requires_grad for t in tensors))


def pad_arguments(operator: AffineConv) -> list[int]:
    """The pads in the order of `F.pad`, last axis first."""
    return [p for lo, hi in zip(reversed(operator.pad_lo), reversed(operator.pad_hi), strict=True) for p in (lo, hi)]


def pad_mode(operator: AffineConv) -> str:
    return "constant" if operator.mode == "zeros" else operator.mode


def layer_of(folded: Folded) -> nn.Module:
    """The plain torch layer of a convolution or linear emit, in the dtype and on the device of what it replaces."""
    operator = folded.emit.operator
    assert operator is not None and folded.weight is not None
    layer = empty_layer(operator)
    layer.weight = _parameter(folded.weight, folded)
    layer.register_parameter("bias", None if folded.bias is None else _parameter(folded.bias, folded))
    return layer


def _parameter(value: Tensor, folded: Folded) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=folded.like.trainable)


def scale_of(value: Tensor, folded: Folded, dims: int) -> nn.Parameter:
    """A scalar, or a per-channel vector that broadcasts over the `dims` axes after it, as a parameter."""
    return _parameter(value.reshape((-1, *(1,) * dims) if value.ndim else ()), folded)


def empty_layer(operator: AffineConv) -> nn.Module:
    bias = operator.bias is not None
    channels = operator.in_channels, operator.out_channels
    if not operator.dims:
        return _uninitialised(nn.Linear, *channels, bias=bias)
    layer = CONV_LAYERS[operator.dims, operator.transposed]
    options: dict[str, Any] = {"stride": operator.stride, "dilation": operator.dilation, "groups": operator.groups}
    if operator.transposed:
        extra = tuple(lo - hi for lo, hi in zip(operator.pad_lo, operator.pad_hi, strict=True))
        options |= {"padding": operator.pad_lo, "output_padding": extra}
    elif needs_explicit_pad(operator):
        options["padding"] = 0
    else:
        options["padding"] = operator.pad_lo if operator.pad_lo == operator.pad_hi else "same"
        options["padding_mode"] = operator.mode if operator.pads else "zeros"
    return _uninitialised(layer, *channels, operator.taps, bias=bias, **options)


def _uninitialised(kind: Any, *args: Any, **options: Any) -> nn.Module:
    """A layer without numbers: to fill it with random ones takes as long as the rest, even where there is no memory."""
    layer: nn.Module = _unfilled(kind)(*args, device="meta", **options)
    layer.__class__ = kind
    return layer


@cache
def _unfilled(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})


#: Calls a function of torch: `call(F.conv2d, x, weight, ...)`.
Caller = Callable[..., Tensor]


def directly(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def run(recipe: Recipe, folded: Mapping[int, Folded], values: Callable[[Anchor], Tensor], call: Caller) -> list[Tensor]:
    """The proof of each part of the recipe on numbers: sketched where an operator is in it, else as it is."""
    return [_run_part(part, folded, values, recipe.dims or 0, call) for part in recipe.parts]


def value_of(
    recipe: Recipe, folded: Mapping[int, Folded], values: Callable[[Anchor], Tensor], doubles: Doubles, call: Caller
) -> Tensor:
    """What the recipe gives on numbers, in float64."""
    dims, parts = recipe.dims or 0, []
    for part in recipe.parts:
        terms = []
        for emit in part:
            f = folded[id(emit)]
            weight, bias = in_layout(emit, lambda k, f=f: evaluate(k, doubles).to(f.like.device))  # type: ignore[misc]
            terms.append(run_emit(emit, weight, bias, f.fill, values(emit.anchor), dims, call))
        parts.append(sum(terms[1:], terms[0]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-dims - 1)


def sketch_of(part: Sequence[Emit]) -> tuple[int, int] | None:
    """Into how many groups the channels of a part are summed, and how many they are; None: they are not summed."""
    operators = [e.operator for e in part if e.operator is not None]
    return (gcd(*(o.groups for o in operators)), operators[0].out_channels) if operators else None


def _run_part(
    part: Sequence[Emit], folded: Mapping[int, Folded], values: Callable[[Anchor], Tensor], dims: int, call: Caller
) -> Tensor:
    sketch, axis = sketch_of(part), -dims - 1
    total = None
    for emit in part:
        f = folded[id(emit)]
        term = run_emit(emit, *f.proof, f.fill, values(emit.anchor), dims, call)
        if sketch is not None:
            term = (
                gathered(term, sketch[0], axis)
                if emit.operator is not None
                else sketched(term, sketch[0], axis, sketch[1])
            )
        total = term if total is None else total + term
    assert total is not None
    return total


def run_emit(
    emit: Emit, weight: Tensor | None, bias: Tensor | None, fill: float, x: Tensor, dims: int,
    call: Caller = directly,
) -> Tensor:  # fmt: skip
    """One term on numbers: a convolution, a scale, or x itself."""
    if emit.operator is not None:
        return _run_operator(emit.operator, weight, bias, fill, x, call)
    if weight is not None:
        x = x * (weight.reshape(-1, *(1,) * dims) if weight.ndim else weight)
    if bias is not None:
        x = x + (bias.reshape(-1, *(1,) * dims) if bias.ndim else bias)
    return x


def _run_operator(
    operator: AffineConv, weight: Tensor | None, bias: Tensor | None, fill: float, x: Tensor, call: Caller
) -> Tensor:
    assert weight is not None
    if not operator.dims:
        return call(F.linear, x, weight, bias)
    if operator.transposed:
        extra = tuple(lo - hi for lo, hi in zip(operator.pad_lo, operator.pad_hi, strict=True))
        convolve = CONVOLVE_TRANSPOSED[operator.dims]
        return convolve(x, weight, bias, operator.stride, operator.pad_lo, extra, operator.groups, operator.dilation)
    inside = operator.pad_lo == operator.pad_hi and operator.mode == "zeros" and not needs_explicit_pad(operator)
    if not inside:
        mode = pad_mode(operator)
        x = F.pad(x, pad_arguments(operator), mode, fill if mode == "constant" else None)
    pads = operator.pad_lo if inside else 0
    return call(CONVOLVE[operator.dims], x, weight, bias, operator.stride, pads, operator.dilation, operator.groups)
