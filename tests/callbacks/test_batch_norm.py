"""BatchNorm statistics after packing, against `torch.optim.swa_utils.update_bn` on the packed model."""

import pytest
import torch
from fits import Net, fit, net, rows
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_qnoise import Int, Quantize, QuantNoise

POLICY = {"fc": Int(2), "head": Int(4)}


class Normed(Net):
    """With a BatchNorm behind the first layer."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.BatchNorm1d(32)


@pytest.mark.parametrize(
    ("asked", "options", "n_batches"), [(100, {}, 8), (3, {}, 3), (100, {"limit_train_batches": 2}, 2)]
)
def test_statistics_are_the_mean_over_training_batches_of_the_packed_model(asked, options, n_batches):
    model = net(cls=Normed)
    made = fit(model, [QuantNoise(POLICY, rate=0.3), Quantize(batch_norm=asked)], **options)
    got = {name: value.clone() for name, value in model.dropout.state_dict().items()}
    update_bn([x for i, (x, _) in enumerate(rows()) if i < n_batches], model)
    for name, value in model.dropout.state_dict().items():
        torch.testing.assert_close(got[name], value)
    assert model.dropout.momentum == 0.1
    assert "train_loss" in made.callback_metrics
    assert "log" not in model.__dict__


def test_zero_batches_and_frozen_norms_keep_the_statistics():
    kept = []
    for batches in (0, 5):
        model = net(cls=Normed)
        fit(model, [Quantize(POLICY, batch_norm=batches)])
        kept.append(model.dropout.running_mean.clone())
    assert not torch.equal(*kept)

    class Frozen(Normed):
        def on_train_epoch_start(self):
            self.dropout.eval()

    model = net(cls=Frozen)
    fit(model, [Quantize(POLICY)])
    assert torch.equal(model.dropout.running_mean, torch.zeros(32))
    with pytest.raises(ValueError, match="batch_norm must be a number of batches >= 0, got -1"):
        Quantize("int8", batch_norm=-1)
