"""Three branches on a 2-channel 9x9 image, conv padding="same" + pointwise conv + the input itself, as one convolution.

The pointwise kernel falls on the centre tap of the 3x3 one; the identity is a pointwise kernel too: the 2x2 identity
matrix. The collapsed weight is printed beside the sum that one would write down by hand.
"""

import torch
from torch import Tensor, nn

import fxrep


class SamePadding(nn.Module):
    """y = conv3x3(x) + conv1x1(x) + x."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.dense = nn.Conv2d(channels, channels, 3, padding="same")
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.pointwise(x) + x


def by_hand(net: SamePadding) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution: all that is not 3x3 goes to the centre tap."""
    weight = net.dense.weight.detach().clone()
    weight[:, :, 1, 1] += net.pointwise.weight.detach()[:, :, 0, 0] + torch.eye(weight.shape[0], dtype=weight.dtype)
    return weight, (net.dense.bias + net.pointwise.bias).detach()


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    torch.set_printoptions(precision=4, sci_mode=False)
    net = SamePadding().double()
    image = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    collapsed = fxrep.reparameterize(net, image)
    (conv,) = (module for module in collapsed.modules() if isinstance(module, nn.Conv2d))
    weight, bias = by_hand(net)
    print(f"one layer is left: {conv}")
    print(f"weight:\n{conv.weight.detach()}\nbias: {conv.bias.detach()}")
    errors = {
        "the weight by hand": conv.weight - weight,
        "the bias by hand": conv.bias - bias,
        "the three branches": collapsed(image) - net(image),
    }
    for what, error in errors.items():
        print(f"error against {what}: {error.abs().max():.1e}")


if __name__ == "__main__":
    main()
