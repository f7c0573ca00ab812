"""An experiment of Lightning, whole or as a checkpoint: what it trains is collapsed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blocks import Net, image, net
from helpers import relative_error
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fxrep
from fxrep.cli import OK, UNUSABLE, main

lightning = pytest.importorskip("lightning", reason="Lightning's experiments are not tested: it is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

SOURCE = """
import lightning, torch
from blocks import net

class Experiment(lightning.LightningModule):
    def __init__(self, rate=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.loss = net(torch.float32), torch.nn.MSELoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = self.loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.rate)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "experiment.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def trained(here: Path) -> tuple[lightning.LightningModule, lightning.Trainer]:
    from experiment import Experiment

    model, x = Experiment(), image(8, 3, 18, 14, dtype=torch.float32)
    with torch.no_grad():
        batches = DataLoader(TensorDataset(x, model(x).detach() + 1), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=here, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, batches)
    return model, trainer


def in_float64(model: lightning.LightningModule, x: Tensor) -> Tensor:
    truth = Net()
    truth.load_state_dict(model.net.state_dict())
    return truth.double().eval()(x.double())


def test_an_experiment_is_collapsed_while_it_is_attached_to_its_trainer(here: Path):
    model, trainer = trained(here)
    x, before = image(dtype=torch.float32), {n: t.clone() for n, t in model.state_dict().items()}
    collapsed = fxrep.reparameterize(model)
    assert (collapsed.report.before["bn"], collapsed.report.after["bn"]) == (10, 0)
    assert relative_error(collapsed(x).double(), in_float64(model, x)) < 2e-6
    assert fxrep.verify(model, collapsed, x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.trainer is trainer
    collapsed.refold(model)
    assert relative_error(collapsed(x).double(), in_float64(model, x)) < 2e-6


def test_its_checkpoint_is_converted(here: Path, capsys: pytest.CaptureFixture[str]):
    model, trainer = trained(here)
    trainer.save_checkpoint(here / "last.ckpt")
    arguments = ["experiment.py:Experiment", "net.pt2", "--weights", "last.ckpt", "--input", "2,3,18,14"]
    assert main(["convert", *arguments]) == OK
    assert "took the entry state_dict" in capsys.readouterr().out
    x = image(dtype=torch.float32)
    found = torch.export.load(here / "net.pt2").module()(x)
    assert relative_error(found.double(), in_float64(model, x)) < 2e-6
    assert relative_error(found.double(), net().eval()(x.double())) > 1e-3  # the weights are those of the checkpoint


def test_a_checkpoint_of_an_experiment_fits_the_network_in_it(here: Path):
    model, trainer = trained(here)
    trainer.save_checkpoint(here / "last.ckpt")
    inner = net(torch.float32, seed=7)
    notes = fxrep.load_weights(inner, here / "last.ckpt")
    assert any("without the prefix 'net.'" in note for note in notes)
    assert all(torch.equal(t, inner.state_dict()[n]) for n, t in model.net.state_dict().items())
    assert main(["convert", "experiment.py:Experiment", "net.pt2", "--weights", "last.ckpt"]) == UNUSABLE
