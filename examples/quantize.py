"""Static int8 of a collapsed RepVGG of unequal ranges, before and after equalize: median, least and largest error.

ONNX Runtime has one scale for each weight, torchao's PT2E flow one for each of a weight's rows.
"""

import warnings
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from repvgg_torchvision import repvgg_stage
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import fxrep


class Batches(CalibrationDataReader):
    """Calibration data as ONNX Runtime wants it."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = ({"x": batch.numpy()} for batch in batches)

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def onnxruntime_int8(net: nn.Module, batches: list[Tensor], x: Tensor) -> Tensor:
    with TemporaryDirectory() as folder:
        full, small = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        torch.onnx.export(net, (x,), full, input_names=["x"], dynamo=True, external_data=False, verbose=False)
        quantize_static(full, small, Batches(batches), weight_type=QuantType.QInt8)
        return torch.from_numpy(onnxruntime.InferenceSession(small).run(None, {"x": x.numpy()})[0])


def torchao_int8(net: nn.Module, batches: list[Tensor], x: Tensor) -> Tensor:
    config = x86.get_default_x86_inductor_quantization_config()
    prepared = prepare_pt2e(torch.export.export(net, (x,)).module(), x86.X86InductorQuantizer().set_global(config))
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)(x)


RUNTIMES = (onnxruntime_int8, torchao_int8)


def unequal_ranges(net: nn.Module) -> nn.Module:
    """Channels whose ranges differ by a factor of a hundred, as those of mobile networks do."""
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_var.uniform_(0.5, 2)
        norm.weight.copy_(torch.logspace(-1.5, 0.5, norm.num_features)[torch.randperm(norm.num_features)])
        norm.bias.normal_(0, 0.1)
    return net.eval()


@torch.no_grad()
def errors(seed: int) -> list[list[float]]:
    """Of int8 by each runtime, without and with equalize."""
    torch.manual_seed(seed)
    *batches, x = (torch.randn(4, 3, 32, 32) for _ in range(9))
    collapsed = fxrep.reparameterize(unequal_ranges(repvgg_stage(3, 16, 4)))
    nets, expected = (collapsed, fxrep.equalize(collapsed, x)), collapsed(x)
    return [[float((run(net, batches, x) - expected).norm() / expected.norm()) for net in nets] for run in RUNTIMES]


def main() -> None:
    warnings.filterwarnings("ignore")  # of exporters
    for run, found in zip(RUNTIMES, zip(*map(errors, range(5)), strict=True), strict=True):
        sides = (f"{median(e):.1%} ({min(e):.1%} to {max(e):.1%})" for e in zip(*found, strict=True))
        less = f"{sum(even < plain for plain, even in found)} of {len(found)} seeds"
        print(f"{run.__name__}: error {' -> '.join(sides)}, less with {less}")


if __name__ == "__main__":
    main()
