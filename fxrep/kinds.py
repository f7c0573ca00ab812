"""Of which Python type the value of a traced node will be, where that is certain: `isinstance` is answered by it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxrep.proxies import VALUE

KIND = "fxrep_kind"
#: What the attributes of a tensor are.
ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "ndim": int, "requires_grad": bool,
    **dict.fromkeys(("T", "mT", "H", "mH", "data", "real", "imag"), Tensor),
}  # fmt: skip
#: Methods and functions that give a number of a tensor.
COUNTS = frozenset(("dim", "ndimension", "numel", "nelement", "element_size"))
#: Those that give several tensors, or may, or none.
_OTHERS = """
    chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split hsplit vsplit dsplit unbind meshgrid
    broadcast_tensors atleast_1d atleast_2d atleast_3d topk sort max min median nanmedian mode kthvalue cummax cummin
    aminmax std_mean var_mean frexp unique unique_consecutive nonzero where histogram svd qr lu eig eigh slogdet lstsq
    tolist item numpy stride data_ptr type names multi_head_attention_forward native_layer_norm native_group_norm
    native_batch_norm gru lstm rnn_tanh rnn_relu lstm_cell _assert
"""
OTHERS = frozenset(_OTHERS.split())
SEVERAL_LAYERS = (
    nn.MultiheadAttention, nn.RNNBase, nn.LSTMCell, nn.AdaptiveLogSoftmaxWithLoss, nn.Sequential, nn.Identity,
)  # fmt: skip
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
LOGICAL = (operator.not_, operator.is_, operator.is_not, operator.contains, operator.truth)


def kind_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> type | None:
    """The type, or None. What is called by no name that is known here gives whatever it gives."""
    if KIND not in node.meta:
        node.meta[KIND] = _found(node, modules)
    known: type | None = node.meta[KIND]
    return known


def _found(node: fx.Node, modules: Mapping[str, nn.Module]) -> type | None:
    if node.op == "placeholder":
        name = str(node.target)
        return dict if name.startswith("**") else tuple if name.startswith("*") else Tensor
    if node.op == "get_attr":
        return type(node.meta[VALUE]) if VALUE in node.meta else None
    if node.op == "call_module":
        return _of_layer(modules.get(str(node.target)))
    kinds = [_plain(kind_of(a, modules) if isinstance(a, fx.Node) else type(a)) for a in node.args]
    if node.op == "call_method":
        return _of_method(str(node.target), kinds)
    if node.target is getattr:
        return _of_attribute(str(node.args[1]), kinds[0])
    if getattr(node.target, "__module__", "") == operator.add.__module__:
        return _of_operator(node, kinds)
    return _of_function(node.target, kinds)


def _plain(kind: type | None) -> type | None:
    """What a tensor of any class comes to once something is computed from it."""
    return Tensor if kind is not None and issubclass(kind, Tensor) else kind


def _of_layer(layer: nn.Module | None) -> type | None:
    """One tensor of a layer of torch, but for those that give several, or what something inside them gives."""
    if not type(layer).__module__.startswith("torch.nn.modules.") or isinstance(layer, SEVERAL_LAYERS):
        return None
    return None if getattr(layer, "return_indices", False) else Tensor


def _of_method(name: str, kinds: Sequence[type | None]) -> type | None:
    if not kinds or kinds[0] is not Tensor or name in OTHERS:
        return None
    if name == "size":
        return int if len(kinds) > 1 else torch.Size
    return int if name in COUNTS else bool if name.startswith("is_") else Tensor


def _of_attribute(name: str, kind: type | None) -> type | None:
    return ATTRIBUTES.get(name) if kind is Tensor else None


def _of_operator(node: fx.Node, kinds: Sequence[type | None]) -> type | None:
    if node.target in LOGICAL:
        return bool
    if node.target is operator.getitem:
        several = isinstance(node.args[1], slice)
        found = {Tensor: Tensor, torch.Size: torch.Size if several else int}
        return None if kinds[0] is None else found.get(kinds[0])
    if Tensor in kinds:
        return Tensor
    if any(kind not in (int, float, bool) for kind in kinds):
        return None
    if node.target in COMPARISONS:
        return bool
    return float if node.target is operator.truediv or float in kinds else int


def _of_function(function: Any, kinds: Sequence[type | None]) -> type | None:
    name = getattr(function, "__name__", "")
    if function is len:
        return int
    owners = (torch, F, torch._C._nn)
    if not any(getattr(owner, name, None) is function for owner in owners) or name in OTHERS:
        return None
    return int if name in COUNTS else bool if name.startswith("is_") else Tensor
