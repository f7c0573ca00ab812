"""What other tools leave of a network's convolutions, batch norms and additions, as a Markdown table.

    python benchmarks/comparison.py [NETWORK …] --into docs/comparison.md

Each tool gets the same network in eval mode, statistics random. Of modules, executed calls are counted, below Python;
of Inductor with freezing, the nodes of the graph that it generates code from (a batch norm that is left counts by its
subtraction of the mean); of ONNX Runtime, the nodes of the model that it saves after its "extended" optimisations, with
an addition fused into a convolution counted as one.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnxruntime
import torch
from tabulate import tabulate
from timm.utils import reparameterize_model
from torch import Tensor, fx, nn
from torch._inductor import config
from torch.fx.experimental.optimization import fuse

import fxrep
from fxrep.cli.models import load
from fxrep.zoo.calls import Calls
from fxrep.zoo.preparation import randomise

NETWORKS = (
    "timm:repvgg_a0", "timm:mobileone_s0", "timm:fastvit_t8", "timm:repvit_m0_9", "timm:ghostnetv3_050",
    "timm:levit_128s", "torchvision:resnet18", "torchvision:googlenet", "timm:inception_v3", "timm:densenet121",
    "timm:convnext_atto", "torchvision:deeplabv3_mobilenet_v3_large",
)  # fmt: skip
MARKS = ("<!-- table: benchmarks/comparison.py -->", "<!-- end of the table -->")
Counts = tuple[int, int, int]
"""Convolutions and linear layers, batch norms, additions of two tensors."""


def executed(net: nn.Module, x: Tensor) -> Counts:
    with Calls() as calls:
        net(x)
    return calls.counts["conv"] + calls.counts["linear"], calls.counts["bn"], calls.counts["add"]


def of_timm(net: nn.Module, x: Tensor) -> Counts:
    return executed(reparameterize_model(net), x)


def of_fuse(net: nn.Module, x: Tensor) -> Counts:
    return executed(fuse(net), x)


def of_fxrep(net: nn.Module, x: Tensor) -> Counts:
    return executed(fxrep.reparameterize(net, x), x)


class _Seen(Exception):
    """Ends a compilation when its graph was seen."""


def of_inductor(net: nn.Module, x: Tensor) -> Counts:
    found: list[Counts] = []

    def look(graph: fx.Graph) -> None:
        found.append(_of_graph(graph))
        raise _Seen

    torch._dynamo.reset()
    settings = {"freezing": True, "post_grad_custom_post_pass": look, "force_disable_caches": True}
    with config.patch({**settings, "cpp.weight_prepack": False}):
        try:
            torch.compile(net, fullgraph=True)(x)
        except Exception as error:  # of Dynamo, around _Seen
            if not found:
                raise RuntimeError("the compilation ended before its graph was seen") from error
    return found[0]


def _of_graph(graph: fx.Graph) -> Counts:
    aten = torch.ops.aten
    calls = [n for n in graph.nodes if n.op == "call_function"]
    layers = [n for n in calls if n.target in (aten.convolution.default, aten.addmm.default, aten.mm.default)]
    means = [n for n in calls if n.target is aten.sub.Tensor and "batch_norm" in str(n.meta.get("original_aten"))]
    sums = [
        n for n in calls
        if n.target is aten.add.Tensor and len(n.all_input_nodes) == 2
        and all("val" in i.meta and i.meta["val"].shape == n.meta["val"].shape for i in n.all_input_nodes)
        and not any(i.op == "get_attr" for i in n.all_input_nodes)
    ]  # fmt: skip
    return len(layers), len(means), len(sums)


def of_onnxruntime(net: nn.Module, x: Tensor) -> Counts:
    with TemporaryDirectory() as folder:
        exported, optimised = Path(folder, "net.onnx"), Path(folder, "optimised.onnx")
        torch.onnx.export(net, (x,), exported, dynamo=True, external_data=False, verbose=False)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimised)
        onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
        return _of_onnx(onnx.load(optimised).graph)


def _of_onnx(graph: onnx.GraphProto) -> Counts:
    constants = {i.name for i in graph.initializer}
    kinds = Counter(n.op_type for n in graph.node)
    sums = [n for n in graph.node if n.op_type == "Add" and not constants & set(n.input)]
    fused = [n for n in graph.node if n.op_type == "FusedConv" and len(n.input) > 3]
    products = [n for n in graph.node if n.op_type in ("MatMul", "FusedMatMul") and constants & set(n.input)]
    layers = sum(kinds[k] for k in ("Conv", "FusedConv", "Gemm", "FusedGemm")) + len(products)
    return layers, kinds["BatchNormalization"], len(sums) + len(fused)


TOOLS: Mapping[str, Callable[[nn.Module, Tensor], Counts]] = {
    "original": executed, "timm": of_timm, "torch.fx fuse": of_fuse, "Inductor, frozen": of_inductor,
    "ONNX Runtime": of_onnxruntime, "fxrep": of_fxrep,
}  # fmt: skip


def row(name: str) -> list[str]:
    net = load(name).eval()
    randomise(net)
    side = 299 if "inception" in name else 224
    x = torch.randn(1, 3, side, side)
    cells = []
    for tool, counted in TOOLS.items():
        print(f"{name}: {tool}", file=sys.stderr)
        try:
            with torch.no_grad(), redirect_stdout(sys.stderr):
                cells.append(" / ".join(map(str, counted(net, x))))
        except Exception as error:  # a tool that fails on a network is a row of the table too
            print(f"{name}: {tool}: {error}", file=sys.stderr)
            cells.append(type(error).__name__)
    return [f"`{name}`", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--into", type=Path, metavar="FILE", help="write between the marks of this document instead")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    table = tabulate([row(name) for name in args.networks], ("network", *TOOLS), "github")
    packages = ", ".join(f"{p} {version(p).partition('+')[0]}" for p in ("torch", "torchvision", "timm", "onnxruntime"))
    text = f"{table}\n\nMeasured with {packages}."
    if args.into is None:
        print(text)
        return
    before, _, after = args.into.read_text(encoding="utf-8").partition(MARKS[0])
    after = after.partition(MARKS[1])[2]
    args.into.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
