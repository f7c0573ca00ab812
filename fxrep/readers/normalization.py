"""Readers of batch normalisation in eval mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrep import kernel as K
from fxrep.errors import Illegal, Refusal
from fxrep.form import AffineForm
from fxrep.kernel import Kernel
from fxrep.readers.registry import Call, First, reader

#: The ranks that each class accepts.
RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
aten = torch.ops.aten
#: What `F.batch_norm` is decomposed into; each gives the batch's statistics beside the normalised value.
NATIVE_BATCH_NORMS = (
    First(aten._native_batch_norm_legit_no_training.default),
    First(aten._native_batch_norm_legit_functional.default),
)


@reader(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def read_batchnorm(at: Call, bn: Any) -> AffineForm | Refusal:
    """BN(x) = γ(x - μ)/σ + β per channel, σ = √(var + ε): rows scaled, bias shifted (DBB transform I)."""
    if bn.training or bn.running_mean is None or bn.running_var is None:
        return _by_batch_statistics(at, "track_running_stats=True")
    ranks = next((r for kind, r in RANKS.items() if isinstance(bn, kind)), ())
    if len(ranks) == 1:
        at.shapes.require_rank(at.shape(at.first), ranks[0])
    mean, var = K.Leaf.of(bn.running_mean), K.Leaf.of(bn.running_var)
    weight, bias = (None if p is None else K.Leaf.of(p) for p in (bn.weight, bn.bias))
    return _normalise(at, at.first, mean, var, weight, bias, bn.eps)


@reader(F.batch_norm)
def read_functional_batchnorm(at: Call) -> AffineForm | Refusal:
    x, mean, var, weight, bias, training, _momentum, eps = at.bind(
        "input running_mean running_var weight bias training momentum eps",
        weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
    )  # fmt: skip
    if training is not False or mean is None or var is None:
        return _by_batch_statistics(at, "call eval() first")
    return _normalise(at, x, at.constant(mean), at.constant(var), at.optional(weight), at.optional(bias), eps)


@reader(*NATIVE_BATCH_NORMS)
def read_native_batchnorm(at: Call) -> AffineForm | Refusal:
    never = at.node.target is aten._native_batch_norm_legit_no_training.default
    names = "input weight bias running_mean running_var training momentum eps"
    x, weight, bias, mean, var, training, _momentum, eps = at.bind(names, training=not never)
    if training:
        return _by_batch_statistics(at, "export it in eval mode")
    return _normalise(at, x, at.constant(mean), at.constant(var), at.optional(weight), at.optional(bias), eps)


def _by_batch_statistics(at: Call, hint: str) -> Refusal:
    return Refusal(at.node.name, "batch-statistics", "normalises by the batch's own statistics", hint)


def _normalise(
    at: Call, x: object, mean: Kernel, var: Kernel, weight: Kernel | None, bias: Kernel | None, eps: float
) -> AffineForm:
    if not isinstance(eps, (int, float)):
        raise Illegal("unsupported-options", "its eps is computed at run time")
    dims = max(at.rank(x) - 2, 0)  # batch norm acts on axis 1, whatever follows it
    channels = var.shape[0]
    at.require_channels(x, dims, channels)
    if at.channels(x, dims) != channels:
        raise Illegal("broadcast", f"{channels} statistics meet {at.channels(x, dims)} channels")

    def gain(var: Tensor, *weight: Tensor) -> Tensor:
        scale = torch.rsqrt(var + eps)
        return scale * weight[0] if weight else scale

    def shift(mean: Tensor, gain: Tensor, *bias: Tensor) -> Tensor:
        return bias[0] - mean * gain if bias else -mean * gain

    gains = K.Map((channels,), gain, (var,) if weight is None else (var, weight))
    shifts = K.Map((channels,), shift, (mean, gains) if bias is None else (mean, gains, bias))
    return at.value(x).scale(gains, shifts, dims)
