"""What a new user does first, and not always rightly: it works, or one sentence says what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import image, net
from helpers import relative_error
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx
from torch.fx import GraphModule

import fxrep

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Experiment(nn.Module):
    """What a LightningModule is to a tracer: a network in a module that also keeps settings, a trainer and steps.

    Without the package; with it, another file tests the real ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.hparams = {"lr": 0.1, "milestones": [1, 2]}
        self.logged: list[Tensor] = []
        self._trainer = None

    @property
    def trainer(self) -> Any:
        if self._trainer is None:
            raise RuntimeError("is not attached to a Trainer")
        return self._trainer

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.device))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self(batch).square().mean()
        self.logged.append(loss.detach())
        self.trainer.progress(index)
        return loss


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_in_place() -> nn.Module:
    model = net()
    model.compile(backend="eager")
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "training": lambda: net().train(),
    "torch.compile": lambda: torch.compile(net(), backend="eager"),
    "Module.compile": compiled_in_place,
    "DataParallel": lambda: nn.DataParallel(net()),
    "DistributedDataParallel": lambda: nn.parallel.DistributedDataParallel(net()),
    "compiled DataParallel": lambda: torch.compile(nn.DataParallel(net()), backend="eager"),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(net()),
    "experiment": Experiment,
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_around_a_network_does_not_keep_it_from_collapsing(kind: str):
    model = WRAPPED[kind]()
    expected = net().eval()(image())
    collapsed = fxrep.reparameterize(model)
    assert relative_error(collapsed(image()), expected) < 1e-12
    assert collapsed.report.after["bn"] == 0
    assert fxrep.explain(model).after == collapsed.report.after


@pytest.mark.parametrize("kind", ["DataParallel", "torch.compile"])
def test_an_original_in_a_wrapper_is_verified_without_inputs(kind: str):
    model = WRAPPED[kind]()
    verdict = fxrep.verify(model, fxrep.reparameterize(model))
    assert verdict
    assert verdict.model == type(net()).__name__


def test_an_experiment_still_fits_after_its_copy_was_collapsed():
    model = Experiment()
    trainer = model._trainer = type("Trainer", (), {"progress": staticmethod(lambda _index: None)})
    fxrep.reparameterize(model)
    model.training_step(image(), 0).backward()
    assert model.trainer is trainer
    assert len(model.logged) == 1
    assert all(p.grad is not None for p in model.parameters())


def test_a_wrapper_that_somebody_looks_at_is_kept():
    model = nn.DataParallel(net())
    model.register_forward_hook(lambda _m, _args, out: out * 2)
    assert relative_error(fxrep.reparameterize(model)(image()), 2 * net().eval()(image())) < 1e-12


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), image())])
def test_a_torchscript_program_comes_back_as_it_is_and_says_what_to_collapse(make: Callable[[nn.Module], nn.Module]):
    result = fxrep.reparameterize(make(net()), image())
    assert relative_error(result(image()), net().eval()(image())) < 1e-12
    (refusal,) = result.report.refusals
    assert refusal.code == "not-traceable"
    assert "collapse the module that it was made from" in refusal.hint
    assert fxrep.verify(make(net()), fxrep.reparameterize(net().eval()), image())


def test_a_container_without_forward_says_so():
    (refusal,) = fxrep.reparameterize(nn.ModuleList([net()])).report.refusals
    assert refusal.reason == "kept with its own forward: it has no forward: it is a container"
    assert "collapse its entries one by one" in refusal.hint


def test_a_quantised_layer_stays_and_what_is_around_it_collapses():
    float_head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).eval()
    model = torch.ao.quantization.quantize_dynamic(float_head, {nn.Linear})
    x = image(2, 3, 3, 3, dtype=torch.float32)
    collapsed = fxrep.reparameterize(model)
    assert type(collapsed.get_submodule("3")) is type(model[3]) is not nn.Linear
    assert collapsed.report.after["bn"] == 0
    assert relative_error(collapsed(x), model(x)) < 0.02  # the input of an int8 layer may round to the next step


def small() -> nn.Module:
    """A float network, and what quantisers want of one."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 5)).eval()


def statically(x: Tensor) -> nn.Module:
    mapping = torch.ao.quantization.QConfigMapping().set_global(torch.ao.quantization.get_default_qconfig("x86"))
    prepared = quantize_fx.prepare_fx(small(), mapping, (x,))
    prepared(x)
    return quantize_fx.convert_fx(prepared)


def exported(x: Tensor) -> nn.Module:
    quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    flow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    config = quantizer.get_default_x86_inductor_quantization_config()
    prepared = flow.prepare_pt2e(
        torch.export.export(small(), (x,)).module(), quantizer.X86InductorQuantizer().set_global(config)
    )
    prepared(x)
    return flow.convert_pt2e(prepared)


@pytest.mark.parametrize("quantise", [statically, exported])
def test_a_quantised_network_comes_back_as_it_is_and_cannot_be_verified(quantise: Callable[[Tensor], nn.Module]):
    x = image(2, 3, 6, 6, dtype=torch.float32)
    model = quantise(x)
    collapsed = fxrep.reparameterize(model, x)
    assert torch.equal(collapsed(x), model(x))
    assert not collapsed.report.collapses
    with pytest.raises(fxrep.FxrepError, match="the one that it was made from"):
        fxrep.verify(model, collapsed, x)


def test_a_quantised_program_comes_back_as_it_is():
    x = image(2, 3, 6, 6, dtype=torch.float32)
    program = torch.export.export(exported(x), (x,))
    assert torch.equal(fxrep.reparameterize(program).module()(x), program.module()(x))


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_layers_whose_weights_are_of_a_class_of_their_own_stay(config: str):
    quantization = pytest.importorskip("torchao.quantization")
    model, x = small(), image(2, 3, 6, 6, dtype=torch.float32)
    quantization.quantize_(model, getattr(quantization, config)())
    collapsed = fxrep.reparameterize(model, x)
    assert collapsed.report.after == collapsed.report.before | {"bn": 0}
    assert type(collapsed.get_submodule("6").weight) is type(model[6].weight) is not nn.Parameter
    assert relative_error(collapsed(x), model(x)) < 0.02


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@NEEDS_CUDA
def test_a_model_on_cuda_with_inputs_on_the_cpu():
    model = net(torch.float32).cuda().eval()
    collapsed = fxrep.reparameterize(model, image(dtype=torch.float32))
    assert {p.device.type for p in collapsed.parameters()} == {"cuda"}
    assert fxrep.verify(model, collapsed, image(dtype=torch.float32))
    with pytest.raises(fxrep.FxrepError, match=r"on cuda:0 and collapsed is torch.float32 on cpu; bring both to one"):
        fxrep.verify(model, collapsed.cpu(), image(dtype=torch.float32))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_inputs_without_numbers_are_told_with_both_devices(device: str, tmp_path: Path):
    """What only shapes are needed for is done; what needs numbers says where they should be."""
    model, x = net().to(device), image().to("meta")
    collapsed = fxrep.reparameterize(model, x)
    assert collapsed.report.after["bn"] == 0
    for call in (fxrep.verify, lambda m, _, x: fxrep.convert(m, tmp_path / "net.pt2", x)):
        with pytest.raises(
            fxrep.FxrepError, match=rf"on meta, .* the model is on {device}\b.*; pass tensors that hold"
        ):
            call(model, collapsed, x)


def test_a_model_without_numbers_collapses_into_one_of_its_shape():
    collapsed = fxrep.reparameterize(net().to("meta"), image())
    assert all(p.is_meta for p in collapsed.parameters())
    assert collapsed.report.after == fxrep.reparameterize(net()).report.after


NAME = Path(__file__).name.replace(".", r"\.")
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "input first": (lambda: fxrep.reparameterize(image(), net()), "the model comes first"),
    "a shape for an input": (lambda: fxrep.explain(net(), (1, 3, 8, 8)), r"shape is: torch\.randn\(1, 3, 8, 8\)"),
    "the wrong channels": (lambda: fxrep.explain(nn.Conv2d(3, 4, 1), image(1, 4, 8, 8)), "example_inputs: input has 4"),
    "a word for a profile": (lambda: fxrep.explain(net(), profile="measured"), "pass a Profile, such as fxrep.calib"),
    "nothing": (lambda: fxrep.reparameterize(None), "got NoneType"),
    "a path": (lambda: fxrep.reparameterize("weights.pth"), "load_weights"),
    "a pathlib path": (lambda: fxrep.explain(Path("weights.pth")), "load_weights"),
    "a state dict": (lambda: fxrep.reparameterize(net().state_dict()), "call load_state_dict"),
    "a list of layers": (lambda: fxrep.reparameterize([nn.ReLU()]), "got list"),
    "verify with inputs second": (lambda: fxrep.verify(net(), image()), "collapsed is a Tensor"),
    "verify with a state dict": (lambda: fxrep.verify(net().state_dict(), net()), "original is a OrderedDict"),
    "refold the wrong way round": (lambda: fxrep.refold(net(), fxrep.reparameterize(net())), "no result of fxrep"),
    "refold a state dict": (lambda: fxrep.refold(fxrep.reparameterize(net()), net().state_dict()), "fold_state_dict"),
    "convert with the path first": (lambda: fxrep.convert("net.onnx", net()), "convert.model, path"),
    "convert nothing": (lambda: fxrep.convert(None, "net.onnx"), "NoneType"),
    "convert without a path": (lambda: fxrep.convert(net(), None, image()), "name the file to write"),
    "convert a program": (lambda: fxrep.convert(torch.export.export(net().eval(), (image(),)), "n.pt2"), "the module"),
    "convert with a word for the axes": (lambda: fxrep.convert(net(), "n.pt2", image(), dynamic="batch"), "the axes"),
    "convert with weights that are loaded": (lambda: fxrep.convert(net(), "n.pt2", image(), weights={}), "checkpoint"),
    "verify what has no numbers": (
        lambda: fxrep.verify(net().to("meta"), net()),
        "on meta, where there are no numbers",
    ),
    "convert what has no numbers": (
        lambda: fxrep.convert(net().to("meta"), "n.pt2", image()),
        "build the model on cpu",
    ),
    "refold what has no numbers": (
        lambda: fxrep.refold(fxrep.reparameterize(net()), net().to("meta")),
        "of the model is on meta",
    ),
    "refold into what has no numbers": (
        lambda: fxrep.refold(fxrep.reparameterize(net()).to("meta"), net()),
        "of the collapsed model is on meta",
    ),
    "load into what has no numbers": (lambda: fxrep.load_weights(net().to("meta"), "w.pth"), "to_empty"),
    "the file first": (lambda: fxrep.load_weights("weights.pth", net()), "load_weights.model, file"),
    "a folder": (lambda: fxrep.load_weights(net(), "."), "is a folder"),
    "no file": (lambda: fxrep.load_weights(net(), "nowhere.pth"), "there is no file"),
    "a misspelt file": (lambda: fxrep.load_weights(net(), Path(__file__).with_suffix(".yp")), rf"mean .*{NAME}"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_call_is_told_in_one_sentence(kind: str):
    call, fact = WRONG[kind]
    with pytest.raises(fxrep.FxrepError, match=fact) as told:
        call()
    assert "\n" not in str(told.value)


def test_a_collapsed_model_can_be_trained_on_without_touching_the_original():
    model = net()
    collapsed = fxrep.reparameterize(model)
    assert isinstance(collapsed, GraphModule)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.optim.SGD(collapsed.parameters(), 0.1).zero_grad()
    collapsed(image()).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
