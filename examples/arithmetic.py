"""The arithmetic of re-parameterization: convolution is linear, so parallel convolutions add up to one.

First in numbers to check by hand: a 3x3 convolution of a 5x5 image plus 0.7 times the image, as two branches and as one
kernel (its centre grows from 0.3 to 1.0, nothing else changes). Then the other rule, a batch norm folded into the
convolution before it, on a 12x32x224x224 input: the error in float64 and the time in float32.
"""

import torch
from measure import median_seconds, randomize_batchnorms, relative_error
from torch import Tensor, nn

import fxrep

IMAGE = [[1, 2, 3, 4, 5], [2, 3, 5, 1, 2], [9, 8, 1, 5, 4], [0, 1, 2, 4, 0], [5, 6, 7, 8, 9]]
KERNEL = [[0.5, 0.1, 0.2], [0.2, 0.3, 0.9], [0.1, 0.4, 0.6]]
GAIN = 0.7


class TwoBranches(nn.Module):
    """y = KERNEL ⊛ x + GAIN · x."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.pointwise = nn.Conv2d(1, 1, 1, bias=False)
        with torch.no_grad():
            self.double()  # first: 0.1 is another number in float32
            self.dense.weight.copy_(torch.tensor([[KERNEL]], dtype=torch.float64))
            self.pointwise.weight.fill_(GAIN)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.pointwise(x)


def conv_bn(c_in: int = 32, c_out: int = 64) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out)).double().eval()
    randomize_batchnorms(net)
    return net


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    image = torch.tensor([[IMAGE]], dtype=torch.float64)
    branches = TwoBranches()
    for name, net in (("two branches", branches), ("one convolution", fxrep.reparameterize(branches))):
        print(f"{name}:")
        print("\n".join(" ".join(f"{value:5.1f}" for value in row) for row in net(image)[0, 0].tolist()), "\n")

    before, x = conv_bn(), torch.randn(12, 32, 224, 224, dtype=torch.float64)
    after = fxrep.reparameterize(before)
    print(f"Conv+BN on {tuple(x.shape)}: float64 relative error {relative_error(after(x), before(x)):.1e}")
    folded, unfolded = median_seconds([after.float(), before.float()], x.float(), rounds=5)
    print(f"in float32: {1e3 * unfolded:.0f} ms -> {1e3 * folded:.0f} ms")


if __name__ == "__main__":
    main()
