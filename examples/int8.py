"""Post-training static quantisation with ONNX Runtime, and the weights that explain what it costs."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn


class Batches(CalibrationDataReader):
    """What the activations' ranges are read from."""

    def __init__(self, x: Tensor) -> None:
        self.left = iter(x.split(32))

    def get_next(self) -> dict[str, object] | None:
        batch = next(self.left, None)
        return None if batch is None else {"x": batch.numpy()}


def quantised(net: nn.Module, calibration: Tensor, per_channel: bool) -> Callable[[Tensor], Tensor]:
    """The network in int8: weights with a scale per tensor or per output channel, activations with one per tensor."""
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, int8 = (str(Path(folder, f"{name}.onnx")) for name in ("plain", "prepared", "int8"))
        batch = {"x": {0: torch.export.Dim("batch")}}
        torch.onnx.export(
            net.eval(), (calibration[:2],), plain, input_names=["x"], dynamic_shapes=tuple(batch.values()),
            dynamo=True, verbose=False,
        )  # fmt: skip
        quant_pre_process(plain, prepared)
        quantize_static(
            prepared, int8, Batches(calibration), quant_format=QuantFormat.QDQ, per_channel=per_channel,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        )  # fmt: skip
        session = ort.InferenceSession(int8, providers=["CPUExecutionProvider"])
    return lambda x: torch.tensor(session.run(None, {"x": x.numpy()})[0])


def kernels(net: nn.Module) -> list[Tensor]:
    return [m.weight.detach() for m in net.modules() if isinstance(m, nn.Conv2d)]


def ranges(net: nn.Module) -> list[float]:
    """max|w| / std of each kernel: how many deviations one int8 scale per tensor must reach."""
    return [(w.abs().max() / w.std()).item() for w in kernels(net)]


def rounding(net: nn.Module) -> list[float]:
    """The error that one int8 scale per tensor makes of each kernel, relative to the kernel."""
    found = []
    for w in kernels(net):
        scale = w.abs().max() / 127
        found.append(((w / scale).round() * scale - w).norm().item() / w.norm().item())
    return found
