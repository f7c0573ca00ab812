"""Blocks of the re-parameterization literature in their training form, from their papers, and what they deploy to.

Each of `PUBLISHED` says which layers may be left: the paper's own deploy form. The code is ours; nothing in the package
knows any of these names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = tuple[object, ...]
C = 8  # channels, where a block has one width


def conv(
    out: int, into: int, *taps: int, stride: int = 1, pad: int = 0, groups: int = 1, transposed: bool = False
) -> Layer:
    """One executed convolution; `into` counts all input channels."""
    rank = len(taps)
    return ("conv", out, into, taps, (stride,) * rank, (pad,) * rank, (1,) * rank, groups, transposed)


def linear(out: int, into: int) -> Layer:
    return ("linear", out, into)


@dataclass(frozen=True)
class Published:
    """A block, the sizes it is run at, and its deploy form: the layers, and the additions between them.

    `ambiguous`: only an example tells how many axes the input has, and with them which one holds the channels.
    """

    build: Callable[[], nn.Module]
    deploy: tuple[Layer, ...]
    additions: int = 0
    shapes: tuple[tuple[int, ...], ...] = ((2, C, 13, 11), (1, C, 16, 20))
    ambiguous: bool = False


class ConvBN(nn.Sequential):
    """A convolution without bias and its batch norm; "same" padding for odd kernels."""

    def __init__(self, into: int, out: int, taps: int | tuple[int, ...], groups: int = 1, stride: int = 1) -> None:
        sizes = (taps, taps) if isinstance(taps, int) else taps
        pad = tuple(k // 2 for k in sizes)
        kind, norm = _OF_RANK[len(sizes)]
        super().__init__(kind(into, out, sizes, stride, pad, groups=groups, bias=False), norm(out))


_OF_RANK = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


class Sum(nn.Module):
    """Σ branch(x)."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


def repvgg() -> nn.Module:
    """3×3, 1×1 and identity, each with its BN (Ding et al., CVPR 2021, arXiv 2101.03697, §3.2)."""
    return nn.Sequential(Sum(ConvBN(C, C, 3), ConvBN(C, C, 1), nn.BatchNorm2d(C)), nn.ReLU())


def qarepvgg() -> nn.Module:
    """BN in the 3×3 branch and after the sum, not at 1×1 and identity (Chu et al., AAAI 2024, 2212.01593, §3.3)."""
    narrow = nn.Conv2d(C, C, 1, bias=False)
    return nn.Sequential(Sum(ConvBN(C, C, 3), narrow, nn.Identity()), nn.BatchNorm2d(C), nn.ReLU())


def acnet() -> nn.Module:
    """A square kernel and its skeleton: 3×3 + 1×3 + 3×1 (Ding et al., ICCV 2019, arXiv 1908.03930, §3.2)."""
    return nn.Sequential(Sum(ConvBN(C, C, 3), ConvBN(C, C, (1, 3)), ConvBN(C, C, (3, 1))), nn.ReLU())


class PaddedBN(nn.Module):
    """BN, then a border of what BN makes of zero, written by item assignment: the 3×3 after it need not pad."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.bn, self.pad = nn.BatchNorm2d(channels), pad

    def forward(self, x: Tensor) -> Tensor:
        bn, p = self.bn, self.pad
        border = (bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)).view(1, -1, 1, 1)
        y = F.pad(bn(x), [p] * 4)
        y[:, :, 0:p, :] = border
        y[:, :, -p:, :] = border
        y[:, :, :, 0:p] = border
        y[:, :, :, -p:] = border
        return y


def dbb(groups: int = 1) -> nn.Module:
    """k×k; 1×1; 1×1 → k×k; 1×1 → average (Ding et al., CVPR 2021, arXiv 2103.13425, §3.3)."""
    sequence = nn.Sequential(
        nn.Conv2d(C, C, 1, bias=False, groups=groups), PaddedBN(C, 1),
        nn.Conv2d(C, C, 3, bias=False, groups=groups), nn.BatchNorm2d(C),
    )  # fmt: skip
    average = nn.Sequential(
        nn.Conv2d(C, C, 1, bias=False, groups=groups), PaddedBN(C, 1), nn.AvgPool2d(3, 1), nn.BatchNorm2d(C)
    )
    return nn.Sequential(Sum(ConvBN(C, C, 3, groups), ConvBN(C, C, 1, groups), sequence, average), nn.ReLU())


class DOConv(nn.Module):
    """W' = D ∘ W: depthwise D (C, M, k²) over-parameterizes W (O, C, M) (Cao et al., arXiv 2006.12030, §3.2)."""

    def __init__(self, into: int, out: int, taps: int = 3, depth: int = 9) -> None:
        super().__init__()
        self.shape = (out, into, taps, taps)
        self.depthwise = nn.Parameter(torch.randn(into, depth, taps * taps) / 9)
        self.weight = nn.Parameter(torch.randn(out, into, depth) / 3)
        self.bn = nn.BatchNorm2d(out)
        self.register_buffer("diagonal", torch.eye(depth, taps * taps))

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("cms,ocm->ocs", self.depthwise + self.diagonal, self.weight)
        return F.relu(self.bn(F.conv2d(x, kernel.reshape(self.shape), padding=self.shape[-1] // 2)))


class ScaledBranches(nn.Module):
    """OREPA linearised: a scale per channel in the place of each branch's BN, one BN after the sum (Hu et al., CVPR
    2022, arXiv 2204.00826, §3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = (nn.Conv2d(C, C, k, padding=k // 2, bias=False) for k in (3, 1))
        self.first = nn.Conv2d(C, 2 * C, 1, bias=False)
        self.second = nn.Conv2d(2 * C, C, 3, padding=1, bias=False)
        self.before_pool, self.pool = nn.Conv2d(C, C, 1, bias=False), nn.AvgPool2d(3, 1, 1)
        self.scales = nn.ParameterList(torch.randn(C, 1, 1) for _ in range(5))
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.wide(x), self.narrow(x), self.second(self.first(x)), self.pool(self.before_pool(x)), x)
        return F.relu(self.bn(sum(scale * y for scale, y in zip(self.scales, branches, strict=True))))


class SqueezedBranches(nn.Module):
    """OREPA squeezed: the same branches as kernels, merged before the one convolution of each step (§3.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(C, C, 3, 3) / C)
        self.narrow = nn.Parameter(torch.randn(C, C, 1, 1) / C)
        self.first = nn.Parameter(torch.randn(2 * C, C) / C)
        self.second = nn.Parameter(torch.randn(C, 2 * C, 3, 3) / C)
        self.before_pool = nn.Parameter(torch.randn(C, C, 1, 1) / C)
        self.scales = nn.Parameter(torch.randn(4, C))
        self.register_buffer("box", torch.full((1, 1, 3, 3), 1 / 9))
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        sequence = torch.einsum("ti,othw->oihw", self.first, self.second)
        kernels = (self.wide, F.pad(self.narrow, [1, 1, 1, 1]), sequence, self.before_pool * self.box)
        weight = torch.einsum("no,noihw->oihw", self.scales, torch.stack(kernels))
        return F.relu(self.bn(F.conv2d(x, weight, padding=1)))


def expandnet() -> nn.Module:
    """A compact 3×3 expanded to 1×1 → 3×3 → 1×1 without activations (Guo et al., NeurIPS 2020, 1811.10495, §3.1)."""
    return nn.Sequential(
        nn.Conv2d(C, 4 * C, 1, bias=False), nn.Conv2d(4 * C, 4 * C, 3, padding=1, bias=False), nn.Conv2d(4 * C, C, 1),
        nn.ReLU(),
    )  # fmt: skip


def mobileone(branches: int = 4) -> nn.Module:
    """k copies, a 1×1 and a BN, depthwise and then pointwise (Vasu et al., CVPR 2023, arXiv 2206.04040, §3.3)."""
    spatial = [ConvBN(C, C, 3, C) for _ in range(branches)]
    mixing = [ConvBN(C, 2 * C, 1) for _ in range(branches)]
    return nn.Sequential(
        Sum(*spatial, ConvBN(C, C, 1, C), nn.BatchNorm2d(C)), nn.ReLU(),
        Sum(*mixing), nn.ReLU(),
        Sum(*(ConvBN(2 * C, 2 * C, 1) for _ in range(branches)), nn.BatchNorm2d(2 * C)), nn.ReLU(),
    )  # fmt: skip


class RepMixer(nn.Module):
    """x + γ·(mixer(x) − norm(x)): token mixing deployed without a skip (Vasu et al., ICCV 2023, 2303.14189, §3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)
        self.mixer = Sum(ConvBN(C, C, 3, C), ConvBN(C, C, 1, C), nn.BatchNorm2d(C))
        self.gamma = nn.Parameter(torch.randn(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * (self.mixer(x) - self.norm(x))


def unireplknet() -> nn.Module:
    """A 13×13 depthwise kernel beside dilated small ones (Ding et al., CVPR 2024, arXiv 2311.15599, §3.1)."""

    def dilated(taps: int, dilation: int) -> nn.Module:
        pad = dilation * (taps - 1) // 2
        return nn.Sequential(
            nn.Conv2d(C, C, taps, padding=pad, dilation=dilation, groups=C, bias=False), nn.BatchNorm2d(C)
        )

    return Sum(dilated(13, 1), dilated(5, 1), dilated(7, 2), dilated(3, 3), dilated(3, 4), dilated(3, 5))


def replknet() -> nn.Module:
    """A very large depthwise kernel, re-parameterized with a 5×5 (Ding et al., CVPR 2022, arXiv 2203.06717, §3)."""
    return nn.Sequential(Sum(ConvBN(C, C, 31, C), ConvBN(C, C, 5, C)), nn.ReLU())


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def repvit() -> nn.Module:
    """Mixer 3×3 + 1×1 + identity, BN after them; then a residual FFN (Wang et al., CVPR 2024, 2307.09283, §3.3)."""
    narrow = nn.Conv2d(C, C, 1, groups=C)
    mixer = nn.Sequential(Sum(ConvBN(C, C, 3, C), narrow, nn.Identity()), nn.BatchNorm2d(C))
    return nn.Sequential(mixer, Residual(ConvBN(C, 2 * C, 1), nn.GELU(), ConvBN(2 * C, C, 1)))


def repghost() -> nn.Module:
    """Cheap features added, not concatenated: depthwise beside a BN (Chen et al., arXiv 2211.06088, §3.3)."""
    return nn.Sequential(ConvBN(C, C, 1), nn.ReLU(), Sum(ConvBN(C, C, 3, C), nn.BatchNorm2d(C)), nn.ReLU())


SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
LAPLACE = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


class Edge(nn.Module):
    """1×1, a border of its bias, then a fixed kernel with a learned scale and bias per channel."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.point = nn.Conv2d(C, C, 1)
        self.scale, self.bias = nn.Parameter(torch.randn(C, 1, 1, 1)), nn.Parameter(torch.randn(C))
        self.register_buffer("kernel", kernel.expand(C, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(bordered(self.point, x), self.scale * self.kernel, self.bias, groups=C)


class Expand(nn.Module):
    """1×1 to more channels, a border of its bias, then 3×3."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.wide = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(2 * C, C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(bordered(self.point, x))


def bordered(point: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1×1 convolution padded by one pixel of what it gives outside its input: its bias."""
    y = F.pad(point(x), (1, 1, 1, 1), "constant", 0)
    border = point.bias.view(1, -1, 1, 1)
    y[:, :, 0:1, :] = border
    y[:, :, -1:, :] = border
    y[:, :, :, 0:1] = border
    y[:, :, :, -1:] = border
    return y


def ecbsr() -> nn.Module:
    """3×3, expand-and-squeeze, Sobel in both directions and Laplacian (Zhang et al., ACM MM 2021,
    doi 10.1145/3474085.3475291, §3.2)."""
    return nn.Sequential(
        Sum(nn.Conv2d(C, C, 3, padding=1), Expand(), Edge(SOBEL), Edge(SOBEL.t()), Edge(LAPLACE)), nn.PReLU(C)
    )


def repsr() -> nn.Module:
    """Expanded 3×3 → BN → 1×1, twice, and a clean identity (Wang et al., ACM MM 2022, arXiv 2205.05671, §3)."""

    def branch() -> nn.Module:
        return nn.Sequential(nn.Conv2d(C, 3 * C, 3, padding=1), nn.BatchNorm2d(3 * C), nn.Conv2d(3 * C, C, 1))

    return nn.Sequential(Sum(branch(), branch(), nn.Identity()), nn.PReLU(C))


def yolo_repconv() -> nn.Module:
    """RepConv: 3×3 + 1×1 + identity, each with BN, then SiLU (Wang et al., CVPR 2023, arXiv 2207.02696, §4.1)."""
    return nn.Sequential(Sum(ConvBN(C, C, 3), ConvBN(C, C, 1), nn.BatchNorm2d(C)), nn.SiLU())


def yolo_repconvn() -> nn.Module:
    """RepConvN: without the identity, because a residual or a concatenation around it has one (the same, §4.1)."""
    return Residual(nn.Sequential(Sum(ConvBN(C, C, 3), ConvBN(C, C, 1)), nn.SiLU()))


class LinearBN(nn.Module):
    """BN over all tokens at once (Graham et al., ICCV 2021, arXiv 2104.01136, §4.2)."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(into, out, bias=False), nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


def levit() -> nn.Module:
    """LeViT's MLP: Linear + BN, Hardswish, Linear + BN, with its residual."""
    return Residual(LinearBN(C, 2 * C), nn.Hardswish(), LinearBN(2 * C, C))


class DualStream(nn.Module):
    """Features and a residual stream side by side, each fed by both (Chao et al., CVPR 2023, "Equivalent
    Transformation and Dual Stream Network Construction", §3.3)."""

    def __init__(self, residual: int = 3) -> None:
        super().__init__()
        self.sizes = [C - residual, residual]
        features = C - residual
        self.keep, self.cross = nn.Conv2d(features, features, 3, padding=1), nn.Conv2d(residual, features, 3, padding=1)
        self.update = nn.Conv2d(features, residual, 3, padding=1, bias=False)
        self.carry = nn.Conv2d(residual, residual, 3, padding=1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        features, residual = z.split(self.sizes, 1)
        carried = self.update(features) + self.carry(residual) + residual
        return F.relu(torch.cat([self.keep(features) + self.cross(residual), carried], 1))


def plainusr() -> nn.Module:
    """RepMBConv: 1×1 → 3×3 → 1×1 with an identity, one 3×3 when deployed (Wang et al., ACCV 2024, 2409.13435, §3.2)."""
    inside = nn.Sequential(
        nn.Conv2d(C, 2 * C, 1, bias=False), nn.Conv2d(2 * C, 2 * C, 3, padding=1, bias=False), nn.Conv2d(2 * C, C, 1)
    )
    return nn.Sequential(Sum(inside, nn.Identity()), nn.GELU())


def speech() -> nn.Module:
    """RepVGG's branches over frames (Ma et al., "Rep Works in Speaker Verification", arXiv 2110.09720, §2)."""
    return nn.Sequential(Sum(ConvBN(C, C, (5,)), ConvBN(C, C, (3,)), ConvBN(C, C, (1,)), nn.BatchNorm1d(C)), nn.ReLU())


def video() -> nn.Module:
    """ACNet's skeletons in space and time: 3×3×3 + 1×3×3 + 3×1×1 + identity, each with BN (after 1908.03930, §3.2)."""
    branches = (ConvBN(C, C, taps) for taps in ((3, 3, 3), (1, 3, 3), (3, 1, 1)))
    return nn.Sequential(Sum(*branches, nn.BatchNorm3d(C)), nn.ReLU())


def upsampling() -> nn.Module:
    """A generator's fractionally strided convolution with BN (Radford et al., ICLR 2016, arXiv 1511.06434, §3)."""
    return nn.Sequential(nn.ConvTranspose2d(C, 2 * C, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * C), nn.ReLU())


ONE = (conv(C, C, 3, 3, pad=1),)
PUBLISHED = {
    "RepVGG": Published(repvgg, ONE),
    "QARepVGG": Published(qarepvgg, ONE),
    "ACNet": Published(acnet, ONE),
    "DBB": Published(dbb, ONE),
    "DBB, grouped": Published(lambda: dbb(4), (conv(C, C, 3, 3, pad=1, groups=4),)),
    "DO-Conv": Published(lambda: DOConv(C, C), ONE),
    "OREPA, linear": Published(ScaledBranches, ONE),
    "OREPA, squeezed": Published(SqueezedBranches, ONE),
    "ExpandNet": Published(expandnet, ONE),
    "MobileOne": Published(
        mobileone, (conv(C, C, 3, 3, pad=1, groups=C), conv(2 * C, C, 1, 1), conv(2 * C, 2 * C, 1, 1))
    ),
    "RepMixer": Published(RepMixer, (conv(C, C, 3, 3, pad=1, groups=C),)),
    "UniRepLKNet": Published(unireplknet, (conv(C, C, 13, 13, pad=6, groups=C),)),
    "RepLKNet": Published(replknet, (conv(C, C, 31, 31, pad=15, groups=C),)),
    "RepViT": Published(
        repvit, (conv(C, C, 3, 3, pad=1, groups=C), conv(2 * C, C, 1, 1), conv(C, 2 * C, 1, 1)), additions=1
    ),
    "RepGhost": Published(repghost, (conv(C, C, 1, 1), conv(C, C, 3, 3, pad=1, groups=C))),
    "ECBSR": Published(ecbsr, ONE),
    "RepSR": Published(repsr, ONE),
    "RepConv": Published(yolo_repconv, ONE),
    "RepConvN": Published(yolo_repconvn, ONE, additions=1),
    "LeViT": Published(
        levit, (linear(2 * C, C), linear(C, 2 * C)), additions=1, shapes=((2, 7, C), (3, 10, C)), ambiguous=True
    ),
    "ETDS": Published(DualStream, ONE),
    "PlainUSR": Published(plainusr, ONE),
    "speech": Published(speech, (conv(C, C, 5, pad=2),), shapes=((2, C, 17), (1, C, 24))),
    "video": Published(video, (conv(C, C, 3, 3, 3, pad=1),), shapes=((2, C, 5, 7, 6), (1, C, 4, 8, 9))),
    "transposed": Published(upsampling, (conv(2 * C, C, 4, 4, stride=2, pad=1, transposed=True),)),
}
