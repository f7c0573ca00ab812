"""The forms in which one network is deployed: as it is, and by each tool's own rewriting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from fxrep.api import reparameterize

#: A new network for a network and an input, with the options of `reparameterize`. Raises LookupError where the tool has
#: none for it.
Form = Callable[[nn.Module, Tensor, Mapping[str, Any]], nn.Module]


def _original(model: nn.Module, _x: Tensor, _options: Mapping[str, Any]) -> nn.Module:
    return copy.deepcopy(model)


def _collapsed(model: nn.Module, x: Tensor, options: Mapping[str, Any]) -> nn.Module:
    return reparameterize(model, x, **options)


def _timm(model: nn.Module, _x: Tensor, _options: Mapping[str, Any]) -> nn.Module:
    """The authors' own: what the classes of the network call fuse, reparameterize or switch_to_deploy."""
    from timm.utils.model import reparameterize_model

    deployed = reparameterize_model(model, inplace=False)
    if deployed.state_dict().keys() == model.state_dict().keys():
        raise LookupError("its classes have no deploy form of their own")
    return deployed


def _fuse(model: nn.Module, _x: Tensor, _options: Mapping[str, Any]) -> nn.Module:
    """torch.fx's: exact pairs of a convolution and a batch norm."""
    from torch.fx.experimental.optimization import fuse

    return fuse(copy.deepcopy(model))


#: `control` is the original once more: what two copies of one network differ by says nothing of a network.
FORMS: Mapping[str, Form] = MappingProxyType({
    "original": _original, "control": _original, "fxrep": _collapsed, "timm": _timm, "fuse": _fuse
})  # fmt: skip
