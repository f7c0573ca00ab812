"""Biases count. Three biased 3x3 convolutions add up to one, and a convolution's bias goes through the BN after it.

The fold of the usual tutorials, W' = W·γ/σ and b' = β − μ·γ/σ, is right only for a convolution without a bias: it loses
b·γ/σ in every pixel of every channel. Here with mean 5, variance 100, γ = 5, β = 20, that is half the bias.
"""

import torch
from torch import Tensor, nn

import fxrep

MEAN, VAR, GAMMA, BETA = 5.0, 100.0, 5.0, 20.0


class ThreeBiases(nn.Module):
    """y = conv_1(x) + conv_2(x) + conv_3(x), each with a bias."""

    def __init__(self, c_in: int = 3, c_out: int = 4) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(c_in, c_out, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.branches
        return first(x) + second(x) + third(x)


def conv_bn(c_in: int = 3, c_out: int = 4) -> nn.Sequential:
    bn = nn.BatchNorm2d(c_out)
    nn.init.constant_(bn.running_mean, MEAN)
    nn.init.constant_(bn.running_var, VAR)
    nn.init.constant_(bn.weight, GAMMA)
    nn.init.constant_(bn.bias, BETA)
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), bn).double().eval()


def gain(bn: nn.BatchNorm2d) -> Tensor:
    """γ/σ, one number per channel."""
    return bn.weight / (bn.running_var + bn.eps).sqrt()


def tutorial_fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """The fold to avoid: it never looks at conv.bias."""
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).to(conv.weight.dtype)
    with torch.no_grad():
        folded.weight.copy_(conv.weight * gain(bn).reshape(-1, 1, 1, 1))
        folded.bias.copy_(bn.bias - bn.running_mean * gain(bn))
    return folded


def show(name: str, channels: Tensor) -> None:
    print(f"{name:>15}: " + " ".join(f"{value:8.1e}" for value in channels.tolist()))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    three = ThreeBiases().double()
    one = fxrep.reparameterize(three)
    left = sum(isinstance(module, nn.Conv2d) for module in one.modules())
    print(f"three biased convolutions became {left}; error {(one(x) - three(x)).abs().max():.1e}\n")

    net = conv_bn()
    conv, bn = net
    lost = conv.bias * gain(bn)
    print("largest error in each channel")
    for name, folded in (("fxrep", fxrep.reparameterize(net)), ("tutorial fold", tutorial_fold(conv, bn))):
        show(name, (net(x) - folded(x)).abs().amax(dim=(0, 2, 3)))
    show("|bias·γ/σ|", lost.abs())


if __name__ == "__main__":
    main()
