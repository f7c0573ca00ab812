"""int8 of a collapsed RepVGG of unequal ranges, by ONNX Runtime and torchao, before and after equalize.

ONNX Runtime: static, one scale for each weight. torchao's PT2E flow: static, one scale for each of a weight's rows.
Errors are relative to the float network, in the Euclidean norm.
"""

import warnings
from pathlib import Path
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

    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self.batches = ({name: batch.numpy()} for batch in batches)

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def with_onnxruntime(net: nn.Module, batches: list[Tensor], x: Tensor) -> Tensor:
    with TemporaryDirectory() as folder:
        full, small = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        torch.onnx.export(net, (x,), full, dynamo=True, external_data=False, verbose=False)
        name = onnxruntime.InferenceSession(full).get_inputs()[0].name
        quantize_static(full, small, Batches(name, batches), weight_type=QuantType.QInt8)
        return torch.from_numpy(onnxruntime.InferenceSession(small).run(None, {name: x.numpy()})[0])


def with_torchao(net: nn.Module, batches: list[Tensor], x: Tensor) -> Tensor:
    config = x86.get_default_x86_inductor_quantization_config()
    prepared = prepare_pt2e(torch.export.export(net, (x,)).module(), x86.X86InductorQuantizer().set_global(config))
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)(x)


def unequal_ranges(net: nn.Module) -> nn.Module:
    """Channels whose ranges differ by a factor of a hundred, as those of mobile networks do."""
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        count = norm.num_features
        norm.running_var.uniform_(0.5, 2)
        norm.weight.copy_(torch.logspace(-1.5, 0.5, count)[torch.randperm(count)])
        norm.bias.normal_(0, 0.1)
    return net.eval()


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore")  # of exporters
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 32, 32) for _ in range(8)]
    x = torch.randn(4, 3, 32, 32)
    collapsed = fxrep.reparameterize(unequal_ranges(repvgg_stage(3, 16, 4)))
    equalised = fxrep.equalize(collapsed, x)
    print(equalised.equalization, "\n")
    expected = collapsed(x)
    for name, quantised in (("ONNX Runtime", with_onnxruntime), ("torchao", with_torchao)):
        before, after = (quantised(net, batches, x) - expected for net in (collapsed, equalised))
        print(f"{name}: error {before.norm() / expected.norm():.1%} -> {after.norm() / expected.norm():.1%}")


if __name__ == "__main__":
    main()
