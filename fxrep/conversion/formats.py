"""The formats that a collapsed network is written in, and how a file of each is run by its own runtime."""

from __future__ import annotations

import copy
import importlib
import io
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._pytree import tree_unflatten

from fxrep.errors import FxrepError, Unusable
from fxrep.verification.compare import Leaf, leaves
from fxrep.verification.inputs import Case

LARGEST_INSIDE = 1_900_000_000
"""Bytes of weights that are kept in the .onnx itself: protobuf ends at 2 GiB, above that they lie beside it."""

Runner = Callable[[Case, list[Leaf]], list[Leaf]]
"""Runs a file on a case; the original's own outputs say what they are called."""


@dataclass(frozen=True)
class Payload:
    """What is to be written: a module, and its program where the format has one."""

    module: nn.Module
    program: ExportedProgram | None

    @property
    def exported(self) -> ExportedProgram:
        assert self.program is not None, "only a state dict is written without a program"
        return self.program


@dataclass(frozen=True)
class Format:
    """A way to write a network, and the runtime that reads it."""

    name: str
    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[Payload, Path], None]
    open: Callable[[Path, nn.Module], Runner]
    has_program: bool = True

    def check_installed(self) -> None:
        for module in self.needs:
            try:
                importlib.import_module(module)
            except Exception as error:  # a runtime built for another machine may raise anything
                raise Unusable(
                    f'{self.name} needs {module}, which cannot be imported ({error}): pip install "fxrep[export]"'
                ) from None


def format_for(path: Path, to: str | None) -> Format:
    """By its name, else by the file's suffix.

    >>> format_for(Path("net.xml"), None).name
    'openvino'
    """
    if to is None:
        found = [f for f in FORMATS.values() if path.suffix in f.suffixes]
        if not found:
            known = ", ".join(f"{s} ({f.name})" for f in FORMATS.values() for s in f.suffixes)
            raise Unusable(f"{path} does not say what to write: name to= (--to), or end it in one of {known}")
        return found[0]
    if to not in FORMATS:
        raise Unusable(f"there is no format {to!r}; there are {', '.join(FORMATS)}")
    if path.suffix not in FORMATS[to].suffixes:
        raise Unusable(
            f"{path.name} would not be found again: files of {to} end in {' or '.join(FORMATS[to].suffixes)}"
        )
    return FORMATS[to]


def program_of(module: nn.Module, case: Case, dynamic: tuple[int, ...]) -> ExportedProgram:
    """`torch.export` of the module, with the axes `dynamic` of its inputs left open.

    Raises FxrepError where it cannot be captured, or not for every size of these axes.
    """
    bound = case.bound()
    shapes = {name: _open_axes(value, dynamic) for name, value in case.arguments.items()} if dynamic else None
    try:
        with redirect_stderr(io.StringIO()):  # of what fails, it prints the whole graph there
            return torch.export.export(module, bound.args, bound.kwargs, dynamic_shapes=shapes)
    except Exception as error:  # capturing runs the forward, which may raise anything
        fact = " ".join(str(error).split())[:240]
        hint = "; with fewer --dynamic axes it may be" if dynamic else "; a state dict needs no capture"
        raise FxrepError(f"torch.export cannot capture the network ({type(error).__name__}: {fact}){hint}") from error


def _open_axes(value: Any, dynamic: tuple[int, ...]) -> Any:
    if isinstance(value, Tensor):
        return {axis: torch.export.Dim.DYNAMIC for axis in dynamic if axis < value.ndim}
    if isinstance(value, (tuple, list)):
        return type(value)(_open_axes(v, dynamic) for v in value)
    return {k: _open_axes(v, dynamic) for k, v in value.items()} if isinstance(value, Mapping) else None


def _write_pt2(payload: Payload, path: Path) -> None:
    buffer = io.BytesIO()  # its own writer ends the process where the disk is full
    torch.export.save(payload.exported, buffer)
    path.write_bytes(buffer.getbuffer())


def _open_pt2(path: Path, _: nn.Module) -> Runner:
    module = torch.export.load(path).module()
    return lambda case, _outputs: leaves(case.call(module))


def _write_onnx(payload: Payload, path: Path) -> None:
    from onnx_ir.passes.common import NameFixPass

    weights = sum(t.nbytes for t in payload.module.state_dict().values())
    specs = [s for s in payload.exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    inputs = [s.arg.name for s in specs if not isinstance(s.arg, ConstantArgument)]  # as the forward names them
    outputs = names_of(_tensors_out(payload.exported), inputs)
    program = torch.onnx.export(
        payload.exported, (), dynamo=True, verbose=False, input_names=inputs, output_names=outputs
    )
    assert program is not None, "only the exporter of old gives none"
    NameFixPass()(program.model)  # a value on the way may be called what an output is called now
    program.save(path, external_data=weights > LARGEST_INSIDE)


def _tensors_out(program: ExportedProgram) -> list[str]:
    """Paths of the outputs that are tensors; a None is left out. Raises TypeError for another constant."""
    args = [s.arg for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    paths = [leaf.path for leaf in leaves(tree_unflatten(range(len(args)), program.call_spec.out_spec))]
    constants = {p: arg.value for p, arg in zip(paths, args, strict=True) if isinstance(arg, ConstantArgument)}
    strange = next((f"{path} is {value!r}" for path, value in constants.items() if value is not None), "")
    if strange:
        raise TypeError(f"{strange}, and a file of ONNX gives tensors alone")
    return [path for path in paths if path not in constants]


def names_of(paths: Iterable[str], inputs: Iterable[str]) -> list[str]:
    """What the outputs are called in a file: their keys, and `output` for what has no key, apart from the inputs.

    >>> names_of(["output['logits']", "output['maps'][0]", "output['x']"], ["x"])
    ['logits', 'maps_0', 'x_1']
    >>> names_of(["output"], []), names_of(["output[0]", "output[1].mask"], [])
    (['output'], ['output_0', 'output_1_mask'])
    """
    taken, names = set(inputs), []
    for path in paths:
        keys = re.findall(r"\w+", path.removeprefix("output"))
        whole = "_".join(keys if keys and not keys[0].isdecimal() else ["output", *keys])
        name = next(n for n in (whole, *(f"{whole}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)
        taken.add(name)
        names.append(name)
    return names


def _open_onnx(path: Path, _: nn.Module) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    there = [o.name for o in session.get_outputs()]

    def run(case: Case, outputs: list[Leaf]) -> list[Leaf]:
        values = [t.cpu().numpy() for t in case.tensors()]
        found = dict(zip(there, session.run(there, dict(zip(names, values, strict=True))), strict=True))
        paths = [o.path for o in outputs if isinstance(o.value, Tensor)]
        known = dict(zip(paths, names_of(paths, names), strict=True))
        same = [Leaf(o.path, _tensor(found.pop(known[o.path], None))) if o.path in known else o for o in outputs]
        return same + [Leaf(f"output {name!r}", _tensor(value)) for name, value in found.items()]

    return run


def _write_openvino(payload: Payload, path: Path) -> None:
    import openvino

    model = openvino.convert_model(payload.exported)
    openvino.save_model(model, path, compress_to_fp16=False)


def _open_openvino(path: Path, _: nn.Module) -> Runner:
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file is moved afterwards
    # The file is judged, not the lower precision that this machine may prefer.
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(case: Case, outputs: list[Leaf]) -> list[Leaf]:
        found = compiled([t.cpu().numpy() for t in case.tensors()])
        return _named([found[i] for i in range(len(compiled.outputs))], outputs)

    return run


def _named(values: list[Any], outputs: list[Leaf]) -> list[Leaf]:
    """The arrays of a runtime as the tensors of the original's outputs, which come in the same order."""
    tensors = map(_tensor, values)
    named = [Leaf(o.path, next(tensors, None)) if isinstance(o.value, Tensor) else o for o in outputs]
    return named + [Leaf(f"output beyond the {len(outputs)} known", t) for t in tensors]


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else torch.from_numpy(value.copy())


def _write_state_dict(payload: Payload, path: Path) -> None:
    state = payload.module.state_dict()
    if path.suffix != ".safetensors":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(buffer.getbuffer())
        return
    from safetensors.torch import save_file

    save_file({name: t.detach().clone().contiguous() for name, t in state.items()}, path)


def _open_state_dict(path: Path, module: nn.Module) -> Runner:
    """Into a copy whose own numbers were made useless first."""
    blank = copy.deepcopy(module)
    for tensor in (*blank.parameters(), *blank.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(torch.nan)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        blank.load_state_dict(load_file(path))
    else:
        blank.load_state_dict(torch.load(path, weights_only=True))
    return lambda case, _outputs: leaves(case.call(blank))


FORMATS: Mapping[str, Format] = MappingProxyType({
    f.name: f for f in (
        Format("pt2", (".pt2",), (), _write_pt2, _open_pt2),
        Format("onnx", (".onnx",), ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
        Format("openvino", (".xml",), ("openvino",), _write_openvino, _open_openvino),
        Format("state_dict", (".pth", ".pt", ".safetensors"), (), _write_state_dict, _open_state_dict, False),
    )
})  # fmt: skip
