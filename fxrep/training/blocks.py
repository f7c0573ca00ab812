"""Published training-time blocks, as data: which branches stand beside a convolution of a given geometry.

Each function gives the branches by name, or raises Illegal where the block has none for the geometry. Layers are
initialised as torch does where the paper says nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxrep.affine import Ints
from fxrep.errors import Illegal
from fxrep.training.branches import ChannelAffine, ChannelShift, FixedKernel, NormThenPad
from fxrep.training.sites import Site

COPIES = 4  # of MobileOne's k×k branch: its S4 variant has as many
#: Kernel sizes and dilations beside a large kernel (UniRepLKNet, arXiv 2311.15599, its authors' code).
DILATED: Mapping[int, tuple[Ints, Ints]] = {
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)), 15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)), 11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)), 7: ((5, 3, 3), (1, 2, 3)), 5: ((3, 3), (1, 2)),
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """`branches` beside the convolution; a `normalised` block has a batch norm at the end of each, and none after. A
    `shifting` one, by a bias or a batch norm, adds to the output of zero."""

    branches: Callable[[Site], Mapping[str, nn.Module]]
    normalised: bool = True
    shifting: bool = True


def normalised(site: Site, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, site.batch_norm())


def repvgg(site: Site) -> dict[str, nn.Module]:
    """1×1 and identity, each with a batch norm (arXiv 2101.03697)."""
    found: dict[str, nn.Module] = {}
    if not site.is_one_tap:
        found["1x1"] = normalised(site, site.convolution((1,) * site.dims))
    return found | _identity(site)


def _identity(site: Site) -> dict[str, nn.Module]:
    return {"identity": site.batch_norm()} if site.keeps_shape else {}


def acnet(site: Site) -> dict[str, nn.Module]:
    """A strip along each axis (arXiv 1908.03930: 1×3 and 3×1)."""
    strips = [tuple(k if i == axis else 1 for i, k in enumerate(site.taps)) for axis in range(site.dims)]
    names = {"x".join(map(str, s)): s for s in strips if s != site.taps and set(s) != {1}}
    if not names:
        raise Illegal("not-expandable", "a kernel along one axis is its own strip")
    return {name: normalised(site, site.convolution(strip)) for name, strip in names.items()}


def mobileone(site: Site) -> dict[str, nn.Module]:
    """Copies of the convolution, 1×1 and identity, each with a batch norm (arXiv 2206.04040)."""
    copies = {f"copy{i}": normalised(site, site.convolution(site.taps)) for i in range(1, COPIES)}
    return copies | repvgg(site)


def dbb(site: Site) -> dict[str, nn.Module]:
    """1×1, 1×1 → k×k and 1×1 → average, each with batch norms (arXiv 2103.13425, figure 2 and table 8).

    The 1×1 before k×k begins as the identity. A depthwise one has no 1×1 branch and averages its input as it is.
    """
    _require_window(site)
    channels, wide = site.conv.in_channels, site.conv.groups == site.conv.out_channels
    middle = 2 * channels if wide else channels
    point = site.inner(middle, (1,) * site.dims)
    if not wide:
        nn.init.dirac_(point.weight, site.conv.groups)
    sequence = normalised(site, point, NormThenPad(site.batch_norm(middle), site.explicit_pads), _last(site, middle))
    box = _fixed(site, torch.full(site.taps, 1 / site.conv.weight[0, 0].numel()))
    if wide and site.conv.in_channels == site.conv.out_channels:
        return {"sequence": sequence, "average": normalised(site, _zero_pad(site), box)}
    averaged = site.inner(site.conv.out_channels, (1,) * site.dims)
    border = NormThenPad(site.batch_norm(), site.explicit_pads)
    return {
        "1x1": normalised(site, site.convolution((1,) * site.dims)),
        "sequence": sequence,
        "average": normalised(site, averaged, border, box),
    }


def ecbsr(site: Site) -> dict[str, nn.Module]:
    """1×1 → 3×3, and 1×1 → Sobel along each axis and → Laplacian, with trained scales and no batch norm.

    (Zhang et al., "Edge-oriented Convolution Block", ACM MM 2021: scales and shifts begin as N(0, 1e-3²).)
    """
    _require_window(site)
    if set(site.taps) != {3}:
        raise Illegal("not-expandable", f"its edge filters have 3 taps along each axis, the convolution {site.taps}")
    middle = 2 * site.conv.out_channels
    last = _last(site, middle, bias=True)
    found: dict[str, nn.Module] = {"sequence": nn.Sequential(*_point(site, middle), last)}
    filters = {f"sobel{axis}": _sobel(site.dims, axis) for axis in range(site.dims)} | {"laplace": _laplace(site.dims)}
    for name, kernel in filters.items():
        found[name] = nn.Sequential(*_point(site, site.conv.out_channels), _fixed(site, kernel), _small_affine(site))
    return found


def dilated(site: Site) -> dict[str, nn.Module]:
    """Smaller kernels, dilated, beside a large one, each with a batch norm (arXiv 2311.15599, section 3.1)."""
    size = site.taps[0]
    if set(site.taps) != {size} or size not in DILATED or set(site.conv.dilation) != {1}:
        raise Illegal(
            "not-expandable", f"there are branches for undilated kernels of {sorted(DILATED)}, not {site.taps}"
        )
    shapes = [((k,) * site.dims, (d,) * site.dims) for k, d in zip(*DILATED[size], strict=True)]
    return {f"{k[0]}d{d[0]}": normalised(site, site.convolution(k, d)) for k, d in shapes}


BLOCKS: Mapping[str, Block] = {
    "repvgg": Block(repvgg), "acnet": Block(acnet), "dbb": Block(dbb), "mobileone": Block(mobileone),
    "ecbsr": Block(ecbsr, normalised=False), "dilated": Block(dilated),
}  # fmt: skip


def _require_window(site: Site) -> None:
    """Sequences pad between their two convolutions, with numbers."""
    if site.is_one_tap:
        raise Illegal("not-expandable", "a kernel of one tap has no smaller one beneath it")
    if site.conv.padding_mode != "zeros" and any(site.explicit_pads):
        raise Illegal(
            "not-expandable", f"its sequences pad with numbers, the convolution in mode {site.conv.padding_mode}"
        )


def _last(site: Site, inputs: int, bias: bool = False) -> nn.Module:
    """The k×k end of a sequence, whose input is already padded."""
    conv = site.conv
    return site.inner(conv.out_channels, site.taps, inputs, stride=conv.stride, dilation=conv.dilation, bias=bias)


def _point(site: Site, outputs: int) -> list[nn.Module]:
    """1×1 with a bias, in a border of that bias."""
    point = site.inner(outputs, (1,) * site.dims)
    bound = point.weight[0].numel() ** -0.5
    bias = torch.empty_like(point.weight[:, 0].flatten()).uniform_(-bound, bound).detach()
    return [point, _zero_pad(site), ChannelShift(bias, site.dims)]


def _zero_pad(site: Site) -> nn.Module:
    layers = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
    return layers[site.dims](tuple(site.explicit_pads))  # type: ignore[arg-type]


def _fixed(site: Site, kernel: Tensor) -> nn.Module:
    return FixedKernel(kernel.to(site.conv.weight), site.conv.out_channels, site.conv.stride, site.conv.dilation)


def _small_affine(site: Site) -> nn.Module:
    weight, bias = (torch.randn_like(site.conv.weight[:, 0].flatten(1)[:, 0]).detach() * 1e-3 for _ in range(2))
    return ChannelAffine(weight, bias, site.dims)


def _sobel(dims: int, axis: int) -> Tensor:
    """(1, 0, -1) along the axis, (1, 2, 1) along the others."""
    kernel = torch.ones((1,) * dims)
    for i in range(dims):
        factor = torch.tensor([1.0, 0.0, -1.0] if i == axis else [1.0, 2.0, 1.0])
        kernel = kernel * factor.reshape([3 if j == i else 1 for j in range(dims)])
    return kernel


def _laplace(dims: int) -> Tensor:
    """1 at the neighbours along each axis, -2·dims in the middle."""
    kernel = torch.zeros((3,) * dims)
    kernel[(1,) * dims] = -2.0 * dims
    for axis in range(dims):
        for side in (0, 2):
            kernel[tuple(side if i == axis else 1 for i in range(dims))] = 1.0
    return kernel
