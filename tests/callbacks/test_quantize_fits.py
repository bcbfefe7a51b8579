"""Quantize at the end of many kinds of fits."""

from pathlib import Path

import pytest
from fits import PQS, Lazy, Manual, Net, fit, net, trainer
from pytorch_lightning.callbacks import EarlyStopping

from lightning_qnoise import Quantize, QuantNoise


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Lazy, {}),
        (Manual, {}),
        (Net, {"max_steps": 5}),
        (Net, {"max_time": {"seconds": 1}, "max_epochs": -1}),
        (Net, {"accumulate_grad_batches": 3}),
        (Net, {"precision": "bf16-mixed"}),
        (Net, {"precision": "bf16-true"}),
        (Net, {"gradient_clip_val": 0.1}),
        (Net, {"check_val_every_n_epoch": 5}),
        (Net, {"val_check_interval": 3}),
        (Net, {"num_sanity_val_steps": 1}),
        (Net, {"max_epochs": 0}),
        (Net, {"reload_dataloaders_every_n_epochs": 1}),
        (Net, {"overfit_batches": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning", "ignore:You are overriding:UserWarning")
def test_kinds_of_fits(cls, options):
    model = net(cls=cls)
    made = fit(model, [QuantNoise(PQS, rate=0.3), Quantize()], **options)
    assert [type(model.fc).__name__, type(model.head).__name__] == ["PackedLinear", "PackedLinear"]
    assert Path("quantized.safetensors").exists()
    assert options.get("max_epochs") == 0 or "quantized/val_loss" in made.callback_metrics


def test_early_stopping_ends_the_fit_and_the_model_is_packed():
    model = net(lr=0.0)
    made = fit(model, [EarlyStopping("val_loss", patience=1), Quantize("int8")], max_epochs=9)
    assert made.current_epoch < 9
    assert type(model.fc).__name__ == "PackedLinear"
    assert trainer().validate(model, verbose=False)[0]["val_loss"] == made.callback_metrics["quantized/val_loss"]
