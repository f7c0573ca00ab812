"""What the inputs and outputs of a file are called: as the forward calls them, or the file is refused."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import image
from helpers import relative_error
from torch import Tensor, nn

import fxrep
from fxrep.conversion import formats
from fxrep.errors import FxrepError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
ort = pytest.importorskip("onnxruntime")

GIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "one": lambda x, y, z: z,
    "tuple": lambda x, y, z: (y, z),
    "dict": lambda x, y, z: {"logits": y, "none": None, "probs": z},
    "nested": lambda x, y, z: {"maps": [y, z], "more": {"last": z + 1}},
    "an input's name": lambda x, y, z: {"scale": y, "image": z},
    "an input itself": lambda x, y, z: (y, x),
    "names of values on the way": lambda x, y, z: {"relu": y, "conv2d": z, "mul": y + z, "conv.weight": z - y},
}
CALLED = {
    "one": ["output"],
    "tuple": ["output_0", "output_1"],
    "dict": ["logits", "probs"],
    "nested": ["maps_0", "maps_1", "more_last"],
    "an input's name": ["scale_1", "image_1"],
    "an input itself": ["output_0", "output_1"],
    "names of values on the way": ["relu", "conv2d", "mul", "conv_weight"],
}


class Gives(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.kind = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), kind

    def forward(self, image: Tensor, flag: bool = True, scale: Tensor | None = None) -> Any:
        y = self.bn(self.conv(image)) * (1 if scale is None else scale)
        return GIVES[self.kind](image, y, y.relu() * 2)


def test_doctests():
    failed, attempted = doctest.testmod(formats)
    assert attempted >= 3
    assert not failed


def arguments() -> tuple[Tensor, Tensor]:
    return image(2, 3, 8, 8, dtype=torch.float32), torch.tensor([1.5])


@pytest.mark.parametrize("kind", GIVES)
def test_a_file_of_onnx_has_the_names_of_the_forward(tmp_path: Path, kind: str):
    x, scale = arguments()
    fxrep.convert(Gives(kind), tmp_path / "net.onnx", (x, True, scale))
    session = ort.InferenceSession(tmp_path / "net.onnx")
    assert [i.name for i in session.get_inputs()] == ["image", "scale"]
    assert [o.name for o in session.get_outputs()] == CALLED[kind]
    expected = torch.utils._pytree.tree_leaves(Gives(kind).double().eval()(x.double(), True, scale.double()))
    found = session.run(CALLED[kind], {"image": x.numpy(), "scale": scale.numpy()})
    for value, truth in zip(found, [t for t in expected if t is not None], strict=True):
        assert relative_error(torch.from_numpy(value).double(), truth) < 1e-6


def test_outputs_are_compared_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    onnx = pytest.importorskip("onnx")
    form = formats.FORMATS["onnx"]

    def swapped(payload: formats.Payload, path: Path) -> None:
        form.write(payload, path)
        model = onnx.load(path)
        outputs = [model.graph.output.pop(), model.graph.output.pop()]
        model.graph.output.extend(outputs)  # another order, the names go along
        onnx.save(model, path)

    monkeypatch.setattr(formats, "FORMATS", {"onnx": replace(form, write=swapped)})
    x, scale = arguments()
    fxrep.convert(Gives("dict"), tmp_path / "net.onnx", (x, True, scale))
    assert [o.name for o in ort.InferenceSession(tmp_path / "net.onnx").get_outputs()] == ["probs", "logits"]


@pytest.mark.parametrize("names", [["logits", "score"], ["probs", "logits"]])
def test_a_file_whose_outputs_are_called_otherwise_is_refused(tmp_path: Path, monkeypatch, names: list[str]):
    form, right = formats.FORMATS["onnx"], formats.names_of

    def renamed(payload: formats.Payload, path: Path) -> None:
        with monkeypatch.context() as context:
            context.setattr(formats, "names_of", lambda *_: names)
            form.write(payload, path)
        assert formats.names_of is right

    monkeypatch.setattr(formats, "FORMATS", {"onnx": replace(form, write=renamed)})
    x, scale = arguments()
    with pytest.raises(FxrepError, match="it was removed"):
        fxrep.convert(Gives("dict"), tmp_path / "net.onnx", (x, True, scale))
    assert not list(tmp_path.iterdir())


def test_what_a_file_of_onnx_cannot_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(GIVES, "a number", lambda x, y, z: {"logits": y, "classes": 4})
    x, scale = arguments()
    with pytest.raises(FxrepError, match=r"output\['classes'\] is 4, and a file of ONNX gives tensors alone"):
        fxrep.convert(Gives("a number"), tmp_path / "net.onnx", (x, True, scale))
