"""The command line: what it loads, what it prints, and what it says when it cannot."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fxrep
from fxrep.cli import FAILED, OK, UNUSABLE, main, make_parser, shape
from fxrep.errors import FxrepError, Refusal
from fxrep.report import Report

NETS = """
from dataclasses import dataclass
from torch import nn

import neighbour

print("the file talks")

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()

class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.tall, self.wide = nn.Conv2d(3, 3, (5, 3), padding=(2, 1)), nn.Conv2d(3, 3, (3, 5), padding=(1, 2))

    def forward(self, x):
        return self.tall(x) + self.wide(x)

def build():
    return Net(8)

def build_of(width, depth):
    return Net(width)

def three():
    return 3

def fails():
    raise ValueError("no such luck\\nand more")

class Zoo:
    net = Net()

instance = neighbour.net
number = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of models and its neighbour, in the working directory."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neighbour.py").write_text("from torch import nn\nnet = nn.Sequential(nn.Conv2d(3, 4, 1))\n")
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "last.pth").touch()
    yield "nets.py"
    for name in ("nets", "neighbour"):
        sys.modules.pop(name, None)


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = UNUSABLE) -> str:
    """The one line on stderr of a call that must fail, and print nothing else."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    *talk, line = err.splitlines()
    assert set(talk) <= {"the file talks"}
    assert line.startswith("fxrep: ")
    return line


def test_help_and_version_are_light():
    """torch takes a second to import: no one should wait for it to read a help text."""
    for argument in ("--help", "--version", "report"):
        code = (
            "import sys\nfrom fxrep.cli import main\n"
            f"try: main([{argument!r}])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_version_is_that_of_the_project(capsys):
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["fxrep", re.search(r'^version = "(.*)"', project, re.MULTILINE)[1]]


def test_help_documents_the_exit_codes():
    text = make_parser().format_help()
    assert re.findall(r"^  (\d)  ", text, re.MULTILINE) == ["0", "1", "2"]


def test_python_dash_m(nets):
    command = [sys.executable, "-m", "fxrep", "explain", f"{nets}:Net", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model"] == "Net"
    assert done.stderr.splitlines() == ["the file talks"]


@pytest.mark.parametrize("name", ["Net", "build", "instance", "Zoo.net"])
@pytest.mark.parametrize("source", ["nets.py", "nets"])
def test_every_kind_of_callable_loads(nets, capsys, source: str, name: str):
    assert main(["report", f"{source}:{name}", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["model"] == ("Sequential" if name == "instance" else "Net")


def test_a_path_with_folders_loads(nets, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir("/")
    assert main(["report", f"{tmp_path / nets}:Net", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["model"] == "Net"


def test_report_rewrites_and_explain_does_not(nets, capsys, monkeypatch):
    called = []
    rewrite = fxrep.reparameterize
    monkeypatch.setattr(
        fxrep, "reparameterize", lambda *args, **options: called.append(args) or rewrite(*args, **options)
    )
    assert main(["explain", f"{nets}:Net"]) == OK
    assert not called
    assert main(["report", f"{nets}:Net"]) == OK
    assert len(called) == 1


@pytest.mark.parametrize("command", ["report", "explain"])
def test_conv_bn_is_seen_to_collapse(nets, capsys, command: str):
    assert main([command, f"{nets}:Net", "--input", "1,3,8,8", "--json"]) == OK
    said = json.loads(capsys.readouterr().out)
    assert (said["before"]["conv"], said["before"]["bn"]) == (1, 1)
    assert (said["after"]["conv"], said["after"]["bn"]) == (1, 0)
    assert len(said["collapses"]) == 1


@pytest.mark.parametrize("command", ["report", "explain"])
def test_strict_is_passed_on(nets, capsys, command: str):
    for flags, convolutions in (([], 1), (["--strict"], 2)):
        assert main([command, f"{nets}:Cross", *flags, "--json"]) == OK
        assert json.loads(capsys.readouterr().out)["after"]["conv"] == convolutions


def test_text_is_the_reports_own(nets, capsys):
    assert main(["report", f"{nets}:Net"]) == OK
    assert capsys.readouterr().out.startswith("fxrep: Net\n")


def test_full_folds_nothing(nets, capsys, monkeypatch):
    pads = tuple(Refusal(f"conv{i}", "pads-over-bias", "padding=1", "padding=0") for i in range(5))
    monkeypatch.setattr(fxrep, "explain", lambda *_, **__: Report("Net", (), pads, {}, {}, 1.0, 1.0))
    assert main(["explain", f"{nets}:Net"]) == OK
    assert "conv4" not in capsys.readouterr().out
    assert main(["explain", f"{nets}:Net", "--full"]) == OK
    assert "conv4" in capsys.readouterr().out


def test_an_error_of_fxrep_is_exit_code_one(nets, capsys, monkeypatch):
    def fail(*_, **__):
        raise FxrepError("this one is beyond us")

    monkeypatch.setattr(fxrep, "reparameterize", fail)
    assert refused(capsys, "report", f"{nets}:Net", code=FAILED) == "fxrep: this one is beyond us"


def test_a_failed_certificate_is_reported_and_is_exit_code_one(nets, capsys, monkeypatch):
    refusal = Refusal("stage.conv", "certificate-failed", "differs by 0.3")
    monkeypatch.setattr(fxrep, "explain", lambda *_, **__: Report("Net", (), (refusal,), {}, {}, 1.0, 1.0))
    assert main(["explain", f"{nets}:Net"]) == FAILED
    out, err = capsys.readouterr()
    assert "[certificate-failed]" in out
    assert "stage.conv" in err


@pytest.mark.parametrize(
    ("text", "sizes"), [("1,3,224,224", (1, 3, 224, 224)), ("2", (2,)), ("1, 3, 8, 8", (1, 3, 8, 8))]
)
def test_shapes(text: str, sizes: tuple[int, ...]):
    assert shape(text) == sizes


@pytest.mark.parametrize("text", ["", "1,,3", "1,x", "0,3", "1x3x8x8", "1.5,3", "1,-3"])
def test_bad_shapes_are_bad_usage(capsys, text: str):
    with pytest.raises(SystemExit, match="2"):
        main(["report", "nets.py:Net", f"--input={text}"])
    err = capsys.readouterr().err
    assert "is no shape" in err
    assert "1,3,224,224" in err


@pytest.mark.parametrize("argv", [[], ["report"], ["shrink", "x:y"], ["report", "x:y", "--jsn"]])
def test_bad_usage(argv: list[str]):
    with pytest.raises(SystemExit, match="2"):
        main(argv)


@pytest.mark.parametrize("command", ["report", "explain"])
def test_a_shape_that_does_not_fit(nets, capsys, command: str):
    said = refused(capsys, command, f"{nets}:Net", "--input", "1,5,8,8")
    assert "does not run on --input 1,5,8,8" in said
    assert "3 channels" in said


@pytest.mark.parametrize("model", ["resnet18", "", ":", "nets.py:", ":Net"])
def test_what_names_no_model(nets, capsys, model: str):
    assert "torchvision:NAME, timm:NAME or path/or.module:callable" in refused(capsys, "report", model)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("torchvison:resnet18", "did you mean torchvision?"),
        ("tim:repvgg_a0", "did you mean timm?"),
        ("no_such_package.nets:Net", "nor an importable module: write torchvision:NAME"),
        ("nets.inner:Net", "nor an importable module: write torchvision:NAME"),
        ("absent/nets.py:Net", "there is no file absent/nets.py (looked from"),
        ("nest.py:Net", "): did you mean nets.py?"),
        ("nets.py", "write nets.py:NAME of a class or function in it"),
        ("last.pth", "name the network whose weights it holds; fxrep convert takes it as --weights"),
        ("nets.py:Nett", "nets.py has no 'Nett': did you mean Net?"),
        ("nets.py:zzz", "nets.py has no 'zzz': name a module class"),
        ("nets.py:Zoo.nut", "nets.py has no 'Zoo.nut'"),
        ("nets.py:number", "is of type int: name an nn.Module"),
        ("nets.py:three", "gives a value of type int: it must give an nn.Module"),
        ("nets.py:build_of", "needs arguments (width, depth): name a function without any"),
        ("nets.py:fails", "building nets.py:fails failed: ValueError: no such luck; "),
    ],
)
def test_what_cannot_be_loaded(nets, capsys, model: str, says: str):
    assert says in refused(capsys, "report", model)


@pytest.mark.parametrize("source", ["broken.py", "broken"])
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1\nx / 0\n", "ZeroDivisionError: division by zero ("),
        ("def f(:\n", "line 1"),
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    ],
)
def test_an_error_in_the_users_file_is_placed(nets, capsys, tmp_path: Path, source: str, code: str, says: str):
    (tmp_path / "broken.py").write_text(code)
    said = refused(capsys, "report", f"{source}:Net")
    assert f"importing {source} failed: " in said
    assert says in said
    assert "shows the whole traceback" in said


@pytest.mark.parametrize(
    ("model", "package"), [("torchvision:resnet18", "torchvision.models"), ("timm:repvgg_a0", "timm")]
)
def test_a_missing_extra_is_named(capsys, monkeypatch, model: str, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(capsys, "report", model)
    assert f"{package.partition('.')[0]} cannot be imported" in said
    assert 'pip install "fxrep[vision]"' in said


@pytest.mark.parametrize(
    ("zoo", "name", "close"), [("torchvision", "resnet_18", "resnet18"), ("timm", "repvgg_a00", "repvgg_a0")]
)
def test_an_unknown_model_has_close_matches(capsys, zoo: str, name: str, close: str):
    pytest.importorskip(zoo)
    said = refused(capsys, "report", f"{zoo}:{name}")
    assert f"{zoo} has no model '{name}': did you mean " in said
    assert close in said


@pytest.mark.parametrize("zoo", ["torchvision", "timm"])
def test_an_unknown_model_like_no_other(capsys, zoo: str):
    pytest.importorskip(zoo)
    assert f"the list_models() of {zoo} names them all" in refused(capsys, "report", f"{zoo}:----")


@pytest.mark.parametrize(
    ("model", "says"),
    [("torchvision:resnet18", "ResNet"), ("timm:repvgg_a0", "ByobNet"), ("timm:resnet18.a1_in1k", "ResNet")],
)
def test_zoo_models_collapse(capsys, model: str, says: str):
    pytest.importorskip(model.partition(":")[0])
    assert main(["report", model, "--json"]) == OK
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == says
    assert said["before"]["bn"] > 0 == said["after"]["bn"]


def test_detection_models_load_no_weights(monkeypatch):
    pytest.importorskip("torchvision")
    from torch import hub, nn

    from fxrep.cli import load

    monkeypatch.setattr(hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
    assert isinstance(load("torchvision:ssdlite320_mobilenet_v3_large"), nn.Module)


@pytest.mark.parametrize(("command", "chip"), [("report", "verified equal"), ("explain", "not verified here")])
def test_a_page_is_written_beside_what_is_printed(nets, capsys, tmp_path: Path, command: str, chip: str):
    assert main([command, f"{nets}:Net", "--html", "out.html"]) == OK
    assert capsys.readouterr().out.startswith("fxrep: Net\n")
    assert chip in (tmp_path / "out.html").read_text(encoding="utf-8")


ODD = """
from torch import nn

class Odd(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
"""


def test_a_page_is_written_where_nothing_could_be_verified(nets, capsys, tmp_path: Path):
    (tmp_path / "odd.py").write_text(ODD)
    assert main(["report", "odd.py:Odd", "--html", "out.html"]) == OK
    assert "not verified for the page" in capsys.readouterr().err
    assert "not verified here" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written(nets, capsys):
    assert "absent/out.html cannot be written" in refused(capsys, "explain", f"{nets}:Net", "--html", "absent/out.html")
