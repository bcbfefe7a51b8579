"""The settings of the finetuning, and dropout that is switched off for it."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from lightning_qnoise import Finetune
from lightning_qnoise.callbacks.dropout import NoDropout
from lightning_qnoise.distill import Guidance
from lightning_qnoise.schedules import WarmupCosine

X = torch.linspace(-1, 1, 4 * 6 * 16).view(4, 6, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be a number >= 1, or one a stage, got 0"),
        ({"epochs": -1}, "epochs must be a number >= 1, or one a stage, got -1"),
        ({"epochs": 1.5}, r"epochs must be a number >= 1, or one a stage, got 1\.5"),
        ({"epochs": None}, "epochs must be a number >= 1, or one a stage, got None"),
        ({"epochs": []}, r"epochs must be a number >= 1, or one a stage, got \[\]"),
        ({"epochs": [1, 0]}, r"epochs must be a number >= 1, or one a stage, got \[1, 0\]"),
        ({"epochs": "3"}, "epochs must be a number >= 1, or one a stage, got '3'"),
        ({"steps": 0}, "steps must be a number >= 1, or one a stage, got 0"),
        ({"steps": 2.0}, r"steps must be a number >= 1, or one a stage, got 2\.0"),
        ({"steps": []}, r"steps must be a number >= 1, or one a stage, got \[\]"),
        ({"steps": (5, None)}, r"steps must be a number >= 1, or one a stage, got \(5, None\)"),
        ({"lr": 0.0}, r"lr must be positive, got 0\.0"),
        ({"lr": -1e-3}, r"lr must be positive, got -0\.001"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"codebook_rate": 0}, "codebook_rate must be positive, got 0"),
        ({"codebook_rate": math.nan}, "codebook_rate must be positive, got nan"),
    ],
)
def test_a_wrong_number_is_refused_in_words(settings, message):
    with pytest.raises(ValueError, match=message + "$"):
        Finetune(**settings)


def test_one_number_serves_every_stage():
    settings = Finetune(epochs=3)
    assert [settings.epochs_of(i) for i in range(4)] == [3, 3, 3, 3]
    assert [settings.steps_of(i) for i in range(4)] == [None] * 4
    assert [Finetune(steps=7).steps_of(i) for i in range(3)] == [7, 7, 7]
    for n_stages in (0, 1, 5):
        assert settings.check_stages(n_stages) is None


@pytest.mark.parametrize("numbers", [[4, 5, 6], (4, 5, 6)])
def test_or_one_a_stage(numbers):
    settings = Finetune(epochs=numbers, steps=numbers)
    assert [settings.epochs_of(i) for i in range(3)] == [settings.steps_of(i) for i in range(3)] == [4, 5, 6]
    assert settings.check_stages(3) is None


@pytest.mark.parametrize(("name", "n_stages"), [("epochs", 2), ("steps", 4), ("steps", 0)])
def test_the_numbers_must_be_as_many_as_the_stages(name, n_stages):
    message = rf"Finetune\({name}=\[1, 2, 3\]\) has 3 numbers for {n_stages} stages"
    with pytest.raises(ValueError, match=message):
        Finetune(**{name: (1, 2, 3)}).check_stages(n_stages)


def test_defaults_are_plain_data_that_cannot_be_changed():
    settings = Finetune()
    assert settings == Finetune(epochs=1, schedule=WarmupCosine(0.1), guidance=Guidance())
    assert settings.reassign and not settings.dropout
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.epochs = 2


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(16, 16, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


LAYERS = {  # model, the layer with a rate, its attribute
    "Dropout": (lambda: nn.Sequential(nn.Dropout(0.4)), "0", "p"),
    "Dropout1d": (lambda: nn.Sequential(nn.Dropout1d(0.4)), "0", "p"),
    "Dropout2d": (lambda: nn.Sequential(nn.Unflatten(2, (4, 4)), nn.Dropout2d(0.4)), "1", "p"),
    "AlphaDropout": (lambda: nn.Sequential(nn.AlphaDropout(0.4)), "0", "p"),
    "MultiheadAttention": (Attending, "attention", "dropout"),
    "LSTM": (lambda: Recurrent(nn.LSTM), "rnn", "dropout"),
    "GRU": (lambda: Recurrent(nn.GRU), "rnn", "dropout"),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 16, dropout=0.4, batch_first=True), "dropout1", "p"),
}


@pytest.mark.parametrize(("build", "name", "attribute"), LAYERS.values(), ids=LAYERS)
def test_no_dropout_layer_drops_until_undo(build, name, attribute):
    model = build().train()
    layer = model.get_submodule(name)

    def runs():
        """Two runs under different seeds."""
        return [torch.manual_seed(seed) and model(X) for seed in (1, 2)]

    before = runs()
    off = NoDropout(model)
    assert getattr(layer, attribute) == 0.0 and model.training
    kept = runs()
    model.eval()
    torch.testing.assert_close(kept[0], model(X))
    assert torch.equal(*kept) and not torch.equal(*before)
    model.train()
    off.undo()
    assert getattr(layer, attribute) == 0.4
    assert all(torch.equal(a, b) for a, b in zip(before, runs(), strict=True))


def test_every_layer_gets_its_own_rate_back_once():
    shared = nn.Dropout(0.3)
    model = nn.Sequential(
        nn.Dropout(0.1), shared, nn.Sequential(shared, nn.Dropout(0.0), nn.LSTM(4, 4, 2, dropout=0.2))
    )
    off = NoDropout(model)
    off.undo()
    rates = [model[0].p, shared.p, model[2][1].p, model[2][2].dropout]
    assert rates == [0.1, 0.3, 0.0, 0.2]
    shared.p = 0.6
    off.undo()
    assert shared.p == 0.6
