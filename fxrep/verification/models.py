"""Models as they are verified: copies that may be changed, in their own dtype or in float64, and how they are run."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import torch
from torch import Tensor, nn

from fxrep.copying import structural_copy
from fxrep.ownership import own_tensors
from fxrep.verification.compare import Leaf, leaves
from fxrep.verification.inputs import Case

ERROR_WIDTH = 200


def kinds(model: nn.Module) -> set[tuple[torch.dtype, torch.device]]:
    """The floating-point dtypes in the model, and where they are."""
    return {(t.dtype, t.device) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}


def like(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of the first parameter (or buffer) that has a floating-point dtype."""
    tensors = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return next(((t.dtype, t.device) for t in tensors), (torch.get_default_dtype(), torch.device("cpu")))


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode with tensors of its own."""
    copy = structural_copy(model)
    own_tensors(copy, model)
    return copy


def widened(model: nn.Module) -> nn.Module:
    """Such a copy in float64, tensors that are plain attributes among them."""
    copy = copied(model)
    for module in copy.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = wide(value)
    return copy._apply(wide)


def wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def run(model: nn.Module, case: Case) -> list[Leaf] | str:
    """The outputs, or the error. Whatever random numbers the model draws, each run starts from the same state."""
    devices = sorted({t.device.index for t in (*model.parameters(), *case.tensors()) if t.is_cuda})
    try:
        # A traced module that fails prints its code besides.
        with torch.random.fork_rng(devices), redirect_stderr(io.StringIO()):
            return leaves(case.call(model))
    except Exception as error:  # a forward may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:ERROR_WIDTH]}"
