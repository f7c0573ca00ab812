"""Three designs made of torchvision's Conv2dNormActivation, none with a to_fast() of its own, each collapsed by a call.

A RepVGG network (3x3, 1x1 and batch-norm-only branches; every stage opens with a block of stride 2), a block of two
unpadded 3x3s, and a residual block. The table shows, before -> after: executed calls, time, peak activation memory (on
CUDA the allocator's peak, on a CPU the bytes of tensors alive at once).
"""

import torch
from measure import median_seconds, peak_bytes, randomize_batchnorms, relative_error
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

import fxrep


class Parallel(nn.Module):
    """ReLU of the sum of its branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        out = first(x)
        for branch in others:
            out = out + branch(x)
        return self.act(out)


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int | None = None) -> nn.Module:
    return Conv2dNormActivation(c_in, c_out, kernel, stride, padding, activation_layer=None)


def repvgg_block(c_in: int, c_out: int, stride: int = 1) -> Parallel:
    identity = [nn.BatchNorm2d(c_in)] if c_in == c_out and stride == 1 else []
    return Parallel(conv_bn(c_in, c_out, 3, stride), conv_bn(c_in, c_out, 1, stride), *identity)


def repvgg_stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
    return nn.Sequential(repvgg_block(c_in, c_out, stride=2), *(repvgg_block(c_out, c_out) for _ in range(depth - 1)))


def designs(c: int = 48) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Each design in float64 and eval mode, with the shape of its input."""
    block_input = (4, c, 56, 56)
    nets: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "RepVGG": (nn.Sequential(repvgg_stage(3, c, 2), repvgg_stage(c, 2 * c, 4)), (4, 3, 128, 128)),
        "two unpadded 3x3": (Parallel(conv_bn(c, c, 3, padding=0), conv_bn(c, c, 3, padding=0)), block_input),
        "residual": (Parallel(conv_bn(c, c, 3), nn.Identity()), block_input),
    }
    for net, _ in nets.values():
        randomize_batchnorms(net.double().eval())
    return nets


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, (before, shape) in designs().items():
        x = torch.randn(shape, dtype=torch.float64)
        after = fxrep.reparameterize(before, x)
        error = relative_error(after(x), before(x))
        calls = [f"{after.report.before[op]} -> {after.report.after[op]}" for op in ("conv", "bn", "add")]
        nets, x = [net.to(device, torch.float32) for net in (before, after)], x.to(device, torch.float32)
        times = " -> ".join(f"{1e3 * seconds:.1f}" for seconds in median_seconds(nets, x))
        memory = " -> ".join(f"{peak_bytes(net, x) / 2**20:.1f}" for net in nets)
        rows.append([name, *calls, f"{error:.0e}", times, memory])
    print(tabulate(rows, ["design", "conv", "bn", "add", "float64 error", f"ms on {device}", "peak MiB"]))


if __name__ == "__main__":
    main()
