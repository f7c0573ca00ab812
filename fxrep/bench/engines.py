"""What runs a network: torch in eager mode, its compiler, and the runtimes that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.bench.setting import Setting
from fxrep.conversion.formats import FORMATS, Payload
from fxrep.stopwatch import Call

#: From a network on its device, in eval mode, and its input to the call that is timed.
Prepare = Callable[[nn.Module, Tensor, Setting], Call]


@dataclass(frozen=True)
class Engine:
    """`needs` are the packages without which there is no such engine; `device` the only type of device it is for."""

    prepare: Prepare
    needs: tuple[str, ...] = ()
    device: str | None = None
    #: whether it allocates through torch, so that its peak of memory can be told
    is_torch: bool = True

    def why_not(self, setting: Setting) -> str:
        """Why it cannot be had here; empty if it can."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if self.device not in (None, setting.device.type):
            return f"for {self.device} alone"
        return "without autocast" if setting.is_autocast and not self.is_torch else ""


def _eager(module: nn.Module, x: Tensor, setting: Setting) -> Call:
    return setting.called(module, x)


def _channels_last(module: nn.Module, x: Tensor, setting: Setting) -> Call:
    if x.ndim != 4:
        raise LookupError("for inputs of four axes alone")
    last = torch.channels_last
    return setting.called(module.to(memory_format=last), x.contiguous(memory_format=last))


def _compiled(module: nn.Module, x: Tensor, setting: Setting) -> Call:
    return setting.called(torch.compile(module, dynamic=False), x)


def _frozen(module: nn.Module, x: Tensor, setting: Setting) -> Call:
    """Weights are constants to the compiler, which folds and packs them."""
    return setting.called(torch.compile(module, dynamic=False, options={"freezing": True}), x)


def _cuda_graph(module: nn.Module, x: Tensor, setting: Setting) -> Call:
    """Recorded once and replayed, so that starting an operator costs nothing."""
    call = setting.called(module, x)
    aside = torch.cuda.Stream(setting.device)
    aside.wait_stream(torch.cuda.current_stream(setting.device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream(setting.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def _onnxruntime(module: nn.Module, x: Tensor, setting: Setting) -> Call:
    import onnxruntime

    provider = "CUDAExecutionProvider" if setting.device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise LookupError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads or torch.get_num_threads()
    options.log_severity_level = 3
    with TemporaryDirectory() as folder:
        path = _written("onnx", module, x, Path(folder) / "network.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    feed = {session.get_inputs()[0].name: x.cpu().numpy()}
    return lambda: session.run(None, feed)


def _openvino(module: nn.Module, x: Tensor, setting: Setting) -> Call:
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file goes away
    options = {"INFERENCE_NUM_THREADS": setting.threads or torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    options |= {"INFERENCE_PRECISION_HINT": "f32"} if setting.stored is torch.float32 else {}
    with TemporaryDirectory() as folder:
        compiled = core.compile_model(_written("openvino", module, x, Path(folder) / "network.xml"), "CPU", options)
    feed = [x.cpu().numpy()]
    return lambda: list(compiled(feed).values())


def _written(form: str, module: nn.Module, x: Tensor, path: Path) -> Path:
    with torch.no_grad():
        FORMATS[form].write(Payload(module, torch.export.export(module, (x,))), path)
    return path


def here(setting: Setting) -> list[str]:
    """The engines that can be had."""
    return [name for name, engine in ENGINES.items() if not engine.why_not(setting)]


ENGINES: Mapping[str, Engine] = MappingProxyType({
    "eager": Engine(_eager),
    "channels_last": Engine(_channels_last),
    "compile": Engine(_compiled),
    "frozen": Engine(_frozen),
    "cuda_graph": Engine(_cuda_graph, device="cuda"),
    "onnxruntime": Engine(_onnxruntime, FORMATS["onnx"].needs, is_torch=False),
    "openvino": Engine(_openvino, FORMATS["openvino"].needs, "cpu", is_torch=False),
})  # fmt: skip
