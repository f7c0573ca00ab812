"""What torch puts around a model, to compile it or to run it on several devices, and the model inside."""

from __future__ import annotations

import sys

from torch import nn

from fxrep.copying import HOOKS


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, DataParallel and DistributedDataParallel, however many.

    They give the outputs of what they hold. One with hooks is no mere wrapper: somebody looks at what it gives.
    """
    inside = _inside()
    while type(model) in inside and not any(getattr(model, kind, None) for kind in HOOKS):
        model = getattr(model, inside[type(model)])
    return model


def _inside() -> dict[type, str]:
    """Wrapper -> the attribute that holds the model. Dynamo is looked up, since importing it takes a second."""
    known: dict[type, str] = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return known if dynamo is None else known | {dynamo.OptimizedModule: "_orig_mod"}
