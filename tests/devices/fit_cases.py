"""Fits on a device that is not the CPU: every callback, and the fit of the CPU with the same draws."""

from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from devices.device import GPU, IS_REAL, at_work, on_device
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qnoise import PQ, Distill, Finetune, Int, ModelSize, Quantize, QuantNoise
from lightning_qnoise import noise as noise_module

X, Y = torch.linspace(-2, 2, 48 * 16).sin().view(48, 1, 4, 4), torch.arange(48) % 10
DYNAMIC, STATIC = {"*": Int(8, activation=Int(8))}, {"*": Int(8, activation=Int(8, mode="static"))}
PRODUCT = {"convolutions.0": None, "*": PQ(8, 4)}
PRODUCT_INT8 = {"convolutions.0": None, "*": PQ(8, 4, codebook=Int(8), activation=Int(8))}
STAGES = ["convolutions.*", "encoder*", ["embedding", "head"]]
CALLBACKS = {
    "int8": lambda: [ModelSize(), QuantNoise("int8", 0.5), Quantize("int8")],
    "dynamic": lambda: [QuantNoise(DYNAMIC, 0.5), Quantize(DYNAMIC)],
    "static": lambda: [QuantNoise(STATIC, 0.5), Quantize(STATIC)],
    "mse": lambda: [QuantNoise({"*": Int(4, range="mse")}, 1.0), Quantize()],
    "lsq": lambda: [QuantNoise({"*": Int(4, range="lsq")}, 1.0), Quantize()],
    "gptq": lambda: [Quantize({"*": Int(4, rounding="gptq")})],
    "pq": lambda: [QuantNoise(PRODUCT, 0.3, refresh=2), Quantize()],
    "mean": lambda: [QuantNoise(PRODUCT, 0.3, kind="mean")],
    "iPQ": lambda: [QuantNoise(PRODUCT, 0.2), Quantize(stages=STAGES, finetune=Finetune(1))],
    "iPQ, int8": lambda: [QuantNoise(PRODUCT_INT8, 0.2), Quantize(stages=STAGES, finetune=Finetune(1))],
    "distilled": lambda: [Distill(Net()), Quantize(PRODUCT, stages=STAGES, finetune=Finetune(1))],
}
WITHOUT_DRAWS = ["gptq", "mse", "lsq"]


class Net(pl.LightningModule):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1)
        self.convolutions = nn.Sequential(*layers)
        self.embedding = nn.Embedding(16, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        h = self.convolutions(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(h + self.embedding(torch.arange(16, device=x.device))).mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def fit(callbacks, is_host=False):
    """The model after a fit; Lightning brings it back to the CPU."""
    loader = DataLoader(TensorDataset(X, Y), 16)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with nullcontext() if is_host else at_work():
        model, seen = Net(), set()
        model.register_forward_hook(lambda module, args, out: seen.add(out.device))
        where = {"accelerator": "cpu"} if is_host else on_device()
        trainer = pl.Trainer(**where, **quiet, max_epochs=2, enable_model_summary=False, callbacks=callbacks)
        trainer.fit(model, loader, loader)
    assert seen == {torch.device("cpu") if is_host else GPU}
    return model.eval()


def check(name, is_comparable):
    y = fit(CALLBACKS[name]())(X).detach()
    assert y.isfinite().all()
    if is_comparable:
        expected = fit(CALLBACKS[name](), is_host=True)(X).detach()
        torch.testing.assert_close(y, expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_fit_of_the_cpu(name):
    check(name, not IS_REAL or name in WITHOUT_DRAWS)


@pytest.mark.skipif(IS_REAL, reason="it always is")
@pytest.mark.parametrize("name", CALLBACKS)
def test_noise_in_one_pass(name, monkeypatch):
    """As on CUDA."""
    monkeypatch.setattr(noise_module, "runs_in_one_pass", lambda device: True)
    check(name, True)
