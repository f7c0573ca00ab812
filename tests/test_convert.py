"""Files that are written: equal when run by their own runtime, or not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blocks import image, net
from helpers import relative_error
from torch import Tensor, nn

import fxrep
from fxrep.cli import FAILED, OK, UNUSABLE, main
from fxrep.conversion import formats, placing
from fxrep.errors import FxrepError, Unusable

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
FLOAT32 = 2e-6
"""The largest error of a file in float32 against the original in float64; measured are 2e-7."""


def run_pt2(path: Path, x: Tensor) -> Tensor:
    return torch.export.load(path).module()(x)


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def run_openvino(path: Path, x: Tensor) -> Tensor:
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = pytest.importorskip("openvino").Core().compile_model(path, "CPU", exact)
    return torch.from_numpy(compiled([x.numpy()])[0])


def run_state(path: Path, x: Tensor) -> Tensor:
    fresh = fxrep.reparameterize(net(x.dtype, seed=5))
    if path.suffix == ".safetensors":
        state = pytest.importorskip("safetensors.torch").load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    fresh.load_state_dict(state)
    return fresh(x)


RUN: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "net.pt2": run_pt2, "net.onnx": run_onnx, "net.xml": run_openvino, "net.pth": run_state,
    "net.safetensors": run_state,
}  # fmt: skip
NEEDS = {"net.onnx": "onnxruntime", "net.xml": "openvino", "net.safetensors": "safetensors"}


@pytest.mark.parametrize("name", RUN)
def test_the_file_gives_what_the_original_gives(tmp_path: Path, name: str):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    model, x = net(torch.float32), image(2, 3, 18, 14, dtype=torch.float32)
    done = fxrep.convert(model, tmp_path / name, x)
    assert sorted(map(Path, done.files)) == sorted(tmp_path.iterdir())
    expected = net().double().eval()(x.double())
    assert relative_error(RUN[name](tmp_path / name, x).double(), expected) < FLOAT32
    assert 0 < done.worst.own_error < FLOAT32
    assert (done.report.before["bn"], done.report.after["bn"]) == (10, 0)


@pytest.mark.parametrize("name", ["net.pt2", "net.pth"])
def test_in_float64_the_file_is_exact(tmp_path: Path, name: str):
    x = image()
    fxrep.convert(net(torch.float32).double(), tmp_path / name, x)
    assert relative_error(RUN[name](tmp_path / name, x), net(torch.float32).double().eval()(x)) < 1e-13


def test_open_axes_take_other_sizes_and_closed_ones_do_not(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    model, other = net(torch.float32).eval(), image(5, 3, 33, 9, dtype=torch.float32)
    done = fxrep.convert(model, tmp_path / "open.onnx", image(1, 3, 16, 16, dtype=torch.float32), dynamic=(0, 2, 3))
    assert len({t.inputs for t in done.trials}) == 3
    assert relative_error(run_onnx(tmp_path / "open.onnx", other).double(), model.double()(other.double())) < FLOAT32
    fxrep.convert(model.float(), tmp_path / "closed.pt2", image(1, 3, 16, 16, dtype=torch.float32))
    with pytest.raises(Exception, match="size"):
        run_pt2(tmp_path / "closed.pt2", other)


class NeedsMultiples(nn.Module):
    """Halves its input twice, and wants the same sizes back."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bn = nn.Conv2d(3, 4, 3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.bn(self.down(x)).relu())


def test_open_axes_are_tried_where_only_some_sizes_are_taken(tmp_path: Path):
    x = image(2, 3, 16, 16, dtype=torch.float32)
    done = fxrep.convert(NeedsMultiples(), tmp_path / "net.pt2", x, dynamic=(2, 3))
    assert {t.inputs for t in done.trials} == {"2x3x16x16", "2x3x16x8", "2x3x8x16"}


def test_open_axes_that_could_not_be_tried_are_told(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 2))
    x = image(2, 3, 8, 8, dtype=torch.float32)
    done = fxrep.convert(model, tmp_path / "net.pt2", x, dynamic=(2, 3))
    assert done.notes == ("the original ran at no other size than 2x3x8x8, so that open axes say nothing of the file",)
    assert not fxrep.convert(model, tmp_path / "batch.pt2", x, dynamic=(0,)).notes


class Remembers(nn.Module):
    """A forward that cannot be traced as it is, and reaches into what it calls: capturing it goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)])
        self.size: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape[-1]:
            self.size = int(x.shape[-1])
        parts = list(self.parts.children())
        return parts[1](parts[0](x))


def test_what_a_forward_hides_is_collapsed_in_the_program_that_is_captured(tmp_path: Path):
    model, x = Remembers(), image(2, 3, 9, 9, dtype=torch.float32)
    nn.init.uniform_(model.parts[1].weight, 0.5, 2)
    assert fxrep.reparameterize(model, x).report.after["bn"] == 1
    done = fxrep.convert(model, tmp_path / "net.pt2", x)
    assert (done.report.before["bn"], done.report.after["bn"]) == (1, 0)
    targets = [str(n.target) for n in torch.export.load(tmp_path / "net.pt2").graph.nodes]
    assert not [t for t in targets if "batch_norm" in t]
    expected = model.double().eval()(x.double())
    assert relative_error(run_pt2(tmp_path / "net.pt2", x).double(), expected) < FLOAT32


@pytest.mark.parametrize("name", ["net.pt2", "net.pth"])
def test_a_finer_dtype_is_folded_in_it(tmp_path: Path, name: str):
    x = image()
    fxrep.convert(net(torch.float32), tmp_path / name, x.float(), dtype="fp64")
    assert relative_error(RUN[name](tmp_path / name, x), net(torch.float32).double().eval()(x)) < 1e-13


def test_outputs_that_rounding_turns_over_are_told(tmp_path: Path):
    class Chaos(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * 1e12).sin()

    x = image(dtype=torch.float32)
    assert "tells little" in fxrep.convert(Chaos(3, 4, 3), tmp_path / "net.pth", x).notes[0]
    assert not fxrep.convert(net(torch.float32), tmp_path / "net.pt", x).notes


def test_a_file_is_for_whoever_new_files_are_for(tmp_path: Path):
    pytest.importorskip("safetensors")
    (tmp_path / "usual").touch()
    fxrep.convert(net(torch.float32), tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_in_another_dtype_is_held_against_the_original_in_that_dtype(tmp_path: Path):
    x = image(dtype=torch.float32)
    done = fxrep.convert(net(torch.float32), tmp_path / "net.pt2", x, dtype="bfloat16")
    assert 1e-4 < done.worst.error < 5e-2
    assert run_pt2(tmp_path / "net.pt2", x.bfloat16()).dtype is torch.bfloat16


def test_weights_come_from_a_checkpoint_and_the_model_stays_as_it_is(tmp_path: Path):
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.save({"model_ema": {f"module.{n}": t for n, t in net(seed=3).state_dict().items()}}, tmp_path / "c.pth")
    done = fxrep.convert(model, tmp_path / "net.pt2", image(), weights=tmp_path / "c.pth")
    assert relative_error(run_pt2(tmp_path / "net.pt2", image()), net(seed=3).eval()(image())) < 1e-13
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert len(done.notes) == 2


def test_weights_too_large_for_a_file_of_onnx_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(formats, "LARGEST_INSIDE", 0)
    x = image(dtype=torch.float32)
    done = fxrep.convert(net(torch.float32), tmp_path / "net.onnx", x)
    assert [Path(f).name for f in done.files] == ["net.onnx", "net.onnx.data"]
    assert relative_error(run_onnx(tmp_path / "net.onnx", x).double(), net().eval()(x.double())) < FLOAT32


# What is refused, and what is left then


def broken(write: formats.Callable[..., None]) -> Callable[..., None]:
    def wrong(payload: formats.Payload, path: Path) -> None:
        with torch.no_grad():
            next(payload.module.parameters()).mul_(1.001)
        program = payload.program and torch.export.export(payload.module, *payload.program.example_inputs)
        write(replace(payload, program=program), path)

    return wrong


@pytest.mark.parametrize("old", [None, "the old file"])
def test_a_file_that_is_not_equal_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str | None):
    pt2 = formats.FORMATS["pt2"]
    monkeypatch.setattr(formats, "FORMATS", {"pt2": replace(pt2, write=broken(pt2.write))})
    if old:
        (tmp_path / "net.pt2").write_text(old)
    with pytest.raises(FxrepError, match=r"not equal to the original on 2x3x18x14: output is off by 0\.0"):
        fxrep.convert(net(), tmp_path / "net.pt2", image(), force=True)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_dtype_that_the_runtime_lacks_is_told(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(FxrepError, match=r"onnx cannot hold or run this network in bfloat16.*another format or dtype"):
        fxrep.convert(net(torch.float32), tmp_path / "net.onnx", image(dtype=torch.float32), dtype="bfloat16")
    assert not list(tmp_path.iterdir())


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_cannot_be_exported_is_told(tmp_path: Path):
    with pytest.raises(FxrepError, match=r"torch\.export cannot capture the network"):
        fxrep.convert(Branches(), tmp_path / "net.pt2", image())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "fact"),
    [
        ("net.onnx", {"to": "tensorrt"}, "there is no format 'tensorrt'; there are pt2, onnx, openvino, state_dict"),
        ("net.onnx", {"to": "pt2"}, "files of pt2 end in .pt2"),
        ("net.bin", {}, "does not say what to write"),
        ("absent/net.pt2", {}, "there is no folder"),
        ("net.pt2", {"dtype": "int8"}, "'int8' is no floating-point dtype"),
        ("net.pt2", {"dtype": "float31"}, "'float31' is no floating-point dtype"),
        ("net.pt2", {"example_inputs": None}, "give example_inputs"),
        ("net.pt2", {"dynamic": (0, 4)}, "no input has an axis 4 to leave open: they are counted from 0 to 3"),
        ("there.pt2", {}, "is there already; give another name, or force=True"),
        ("net.pt2", {"weights": "absent.pth"}, "there is no file absent.pth"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_sentence(tmp_path: Path, name: str, options: dict, fact: str):
    (tmp_path / "there.pt2").write_text("mine")
    with pytest.raises(Unusable) as told:
        fxrep.convert(net(), tmp_path / name, **{"example_inputs": image(), **options})
    assert fact in str(told.value)
    assert "\n" not in str(told.value)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "module"), [("n.onnx", "onnxruntime"), ("n.onnx", "onnxscript"), ("n.xml", "openvino")]
)
def test_a_missing_runtime_is_named_before_anything_is_done(tmp_path: Path, monkeypatch, name: str, module: str):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Unusable, match=rf'needs {module}, .*pip install "fxrep\[export\]"'):
        fxrep.convert(net(), tmp_path / name, image())


def test_weights_that_are_no_numbers_are_told(tmp_path: Path):
    model = net()
    nn.init.constant_(next(model.parameters()), torch.nan)
    with pytest.raises(Unusable, match=r"the weights \S+ hold nan"):
        fxrep.convert(model, tmp_path / "net.pt2", image())


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_done(tmp_path: Path, monkeypatch):
    def readonly(*_args: object, **_options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(placing, "TemporaryDirectory", readonly)
    with pytest.raises(Unusable, match=f"cannot be written to: {os.strerror(errno.EROFS)}"):
        fxrep.convert(net(), tmp_path / "net.pt2", image())


# The command line

NET = """
import torch
from torch import nn
torch.manual_seed(0)
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
def two():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b.mean()
    return Two()
def words():
    return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
def half():
    return net().half()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", "nets.py:net", "--to", "pt2", "--input", "1,3,8,8", "net.pt2"]) == OK
    assert "net.pt2: pt2 in float32, run on 1x3x8x8: error" in capsys.readouterr().out
    assert main(["convert", "nets.py:net", "net.pt2", "--input", "1,3,8,8"]) == UNUSABLE
    assert "--force" in capsys.readouterr().err
    assert main(["convert", "nets.py:net", "net.pt2", "--input", "1,3,8,8", "--force", "--json"]) == OK
    said = json.loads(capsys.readouterr().out)
    assert (said["equal"], said["files"], said["after"]["bn"]) == (True, ["net.pt2"], 0)
    assert said["error"] <= said["allowed"]


def test_several_inputs_have_a_shape_each(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", "nets.py:two", "two.pt2", "--input", "2,3", "--input", "5"]) == OK
    assert "run on 2x3, 5" in capsys.readouterr().out


def test_the_dtype_of_an_input_is_told_or_that_of_the_model(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", "nets.py:words", "w.pt2", "--input", "2,5:int64"]) == OK
    assert main(["convert", "nets.py:half", "h.pt2", "--input", "1,3,8,8"]) == OK
    assert "pt2 in float16" in capsys.readouterr().out
    assert main(["convert", "nets.py:words", "v.pt2", "--input", "2,5"]) == UNUSABLE
    assert "1,128:int64" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "nets.py:words", "v.pt2", "--input", "2,5:int7"])


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file may become larger than this
from fxrep.cli import main
sys.exit(main(["convert", "nets.py:net", sys.argv[1], "--input", "1,3,8,8", "--dtype", "fp64"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another system")
@pytest.mark.parametrize("name", ["net.pt2", "net.pth"])
def test_a_full_disk_is_told_and_nothing_is_left(here: Path, name: str):
    before = sorted(here.iterdir())
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", FULL, name], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (
        UNUSABLE, f"fxrep: {name} cannot be written: {os.strerror(errno.EFBIG)}; nothing was left\n"
    )  # fmt: skip
    assert sorted(here.iterdir()) == before


def test_what_fails_is_exit_code_one(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    pt2 = formats.FORMATS["pt2"]
    monkeypatch.setattr(formats, "FORMATS", {"pt2": replace(pt2, write=broken(pt2.write))})
    assert main(["convert", "nets.py:net", "net.pt2", "--input", "1,3,8,8"]) == FAILED
    assert "not equal" in capsys.readouterr().err
    assert not (here / "net.pt2").exists()


@pytest.mark.parametrize("axes", ["a", "0,", "-1"])
def test_axes_are_numbers(here: Path, capsys: pytest.CaptureFixture[str], axes: str):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "nets.py:net", "net.pt2", f"--dynamic={axes}"])
    assert "names no axes" in capsys.readouterr().err


#: A shell that starts the tests in the background has them ignore the first of the signals.
STOPPED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from fxrep.cli import main
from fxrep.conversion import door
def wait(*_):
    print("written", flush=True)
    time.sleep(60)
door._run = wait
sys.stdout = sys.__stdout__
sys.exit(main(["convert", "nets.py:net", "net.pth", "--input", "1,3,8,8", "--force"]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of another system")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_half_way_it_leaves_what_was_there(here: Path, stop: signal.Signals, code: int):
    (here / "net.pth").write_text("the old file")
    process = subprocess.Popen([sys.executable, "-c", STOPPED], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any("written" in line for line in process.stderr)  # the new file is whole, in its folder
    process.send_signal(stop)
    assert process.wait(30) == code
    process.stderr.close()
    assert (here / "net.pth").read_text() == "the old file"
    left = {p.name for p in here.iterdir() if p.name.startswith(".net.pth.")}
    assert bool(left) == (stop == signal.SIGKILL)  # nobody can clean up after that one
