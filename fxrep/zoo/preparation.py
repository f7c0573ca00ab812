"""Networks as they are swept: numbers that hide no error, and inputs of the kind that each takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.errors import Unusable
from fxrep.verification.inputs import sampler
from fxrep.verification.models import like, run

Arguments = tuple[Any, ...]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random affines of batch norms, and random values for scales that start at zero or nearly so.

    Thresholds of detectors go to zero: an untrained one finds nothing above them, and nothing would be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if _has_statistics(module) and isinstance(module.weight, Tensor) and isinstance(module.bias, Tensor):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
        if isinstance(getattr(module, "score_thresh", None), float):
            module.score_thresh = 0.0  # type: ignore[assignment]
    for parameter in model.parameters():
        if parameter.numel() and _is_silent(parameter):
            parameter.data.normal_(0, 0.2, generator=generator)


def _is_silent(parameter: Tensor) -> bool:
    """Zero, or one small number everywhere: LayerScale starts at 1e-5, where no error in its branch would be seen."""
    first = float(parameter.flatten()[0])
    return abs(first) < 0.1 and (first == 0 or parameter.numel() > 1) and bool((parameter == first).all())


def _has_statistics(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def calibrate(model: nn.Module, arguments: Arguments) -> None:
    """Random statistics around those of real activations: far from them, a deep network forgets its input."""
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if _has_statistics(module)]

    def take(norm: Any, args: tuple[Tensor, ...]) -> None:
        _take_statistics(norm, args[0], generator)

    hooks = [norm.register_forward_pre_hook(take) for norm in norms]
    try:
        call(model, arguments)
    finally:
        for hook in hooks:
            hook.remove()


def _take_statistics(norm: Any, x: Tensor, generator: torch.Generator) -> None:
    var, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1])
    if not bool(var.isfinite().all()):
        return  # one value a channel has no variance
    var = var.clamp(min=max(0.1 * float(var.mean()), 1e-6))  # a channel that is nearly constant would be all noise
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
    norm.running_mean.copy_(mean + 0.3 * var.sqrt() * noise)
    norm.running_var.copy_(var * (torch.rand(var.shape, generator=generator, dtype=var.dtype) + 0.5))


def call(model: nn.Module, arguments: Arguments) -> Any:
    """The output, always from the same random state, on copies that the model may overwrite."""
    fresh = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, arguments)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        return model(*fresh)


def arguments_for(model: nn.Module) -> Arguments:
    """Random arguments of a call: by the library that the model is of, or else what the network itself tells."""
    generator = torch.Generator().manual_seed(2)
    shapes = _shapes(model)
    if shapes is None:
        return _told_by(model)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    if type(model).__module__.startswith("torchvision.models.detection"):
        return ([image.sigmoid() for image in drawn],)  # a list of images of different sizes, with values in [0, 1]
    return tuple(drawn)


def _shapes(model: nn.Module) -> list[tuple[int, ...]] | None:
    """Small inputs, two in a batch where a batch is taken; a network of fixed size gets that size."""
    library, *rest = type(model).__module__.split(".")
    config: Any = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if library == "timm" and config:
        fits = not config.get("fixed_input_size") and config.get("min_input_size")
        return [(2, *(fits or config["input_size"]))]
    if library == "transformers":
        size = getattr(model.config, "image_size", 224)
        return [(2, 3, *((size, size) if isinstance(size, int) else size))]
    if library != "torchvision":
        return None
    kinds = (".".join(rest[1:]), *rest[1:2], "")
    return next(_TORCHVISION[kind] for kind in kinds if kind in _TORCHVISION)


_TORCHVISION: dict[str, list[tuple[int, ...]]] = {
    "": [(2, 3, 128, 128)],
    "detection": [(3, 160, 192), (3, 128, 160)],
    "segmentation": [(2, 3, 128, 160)],
    "optical_flow": [(1, 3, 128, 136), (1, 3, 128, 136)],
    "video": [(2, 3, 8, 64, 56)],
    "video.s3d": [(1, 3, 16, 224, 224)],
    "video.mvit": [(1, 3, 16, 224, 224)],
    "swin_transformer": [(2, 3, 64, 64)],
    "vision_transformer": [(2, 3, 224, 224)],
    "maxvit": [(2, 3, 224, 224)],
    "inception": [(2, 3, 299, 299)],
}


def _told_by(model: nn.Module) -> Arguments:
    def attempt(case: Any) -> str | None:
        out = run(model, case)
        return out if isinstance(out, str) else None

    case = sampler(model, None, 0, like(model), attempt).draw(lambda size, _: size, 2, False, 0)
    bound = inspect.BoundArguments(case.signature, case.arguments)
    if bound.kwargs:
        raise Unusable(f"{type(model).__name__} needs keyword arguments ({', '.join(bound.kwargs)})")
    return bound.args
