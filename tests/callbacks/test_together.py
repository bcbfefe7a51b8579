"""Our callbacks beside Lightning's own that touch weights, learning rates or the length of the fit."""

import copy
import warnings

import pytest
import torch
from fits import PQS, ROOTS, Net, checkpoint, equal, fit, losses, net, rows
from pytorch_lightning import Callback, callbacks
from torch import nn

from lightning_qnoise import PQ, Int, ModelSize, Quantize, QuantNoise, quantize

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:The checkpoint was not created with WeightAveraging:UserWarning",
)
needs_ema = pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning < 2.6")


class Keep(Callback):
    """A copy of the weights at the end, as they are at this place in the list."""

    def on_train_end(self, trainer, pl_module):
        self.state = copy.deepcopy(pl_module.state_dict())


def ema():
    return callbacks.EMAWeightAveraging(decay=0.5)


def as_quantized(state, policy=PQS):
    model = net()
    model.load_state_dict(state)
    return quantize(model, policy)


@needs_ema
@pytest.mark.parametrize("first", [True, False], ids=["noise_first", "ema_first"])
def test_the_average_is_packed_when_it_comes_before_quantize(first):
    keep, average, noise = Keep(), ema(), QuantNoise(PQS, rate=0.5)
    model = net()
    pair = [noise, average] if first else [average, noise]
    made = fit(model, [*pair, keep, Quantize(), checkpoint(every_n_epochs=9, save_last=True)])
    assert equal(as_quantized(keep.state), model)
    expected = losses(model, rows(32))[0]
    assert float(made.callback_metrics["quantized/val_loss"]) == pytest.approx(expected, abs=1e-6)
    assert made.validate(model, verbose=False)[0]["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert equal(as_quantized(keep.state), model)  # validation swapped nothing
    loaded = Net.load_from_checkpoint("ckpt/last.ckpt")
    assert losses(loaded, rows(32))[0] == pytest.approx(expected, abs=1e-6)
    fit(net(), [*copy_of(pair), Quantize()], max_epochs=3, ckpt_path="ckpt/last.ckpt")


def copy_of(pair):
    return [QuantNoise(PQS, rate=0.5) if isinstance(c, QuantNoise) else ema() for c in pair]


@needs_ema
def test_noise_at_rate_zero_leaves_the_average_as_it_is():
    models = [net(), net()]
    for model, extra in zip(models, ([], [QuantNoise(PQS, rate=0.0)]), strict=True):
        fit(model, [ema(), *extra])
    assert equal(*models)


def swa():
    return callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, device=None)


def pruning():
    return callbacks.ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=None)


WRITERS = {"swa": swa, "pruning": pruning} | ({"ema": ema} if hasattr(callbacks, "EMAWeightAveraging") else {})


@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_weights_at_the_end_must_come_before_quantize(name):
    with pytest.raises(ValueError, match="overwrites the weights at the end of the fit: list it before Quantize"):
        fit(net(), [QuantNoise("int8"), Quantize(), WRITERS[name]()])
    fit(net(), [QuantNoise("int8"), Quantize(enabled=False), WRITERS[name]()], max_epochs=3)


class Scheduled(Net):
    """SWA replaces a learning rate scheduler."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_stochastic_weight_averaging_before_quantize():
    keep, model = Keep(), net(cls=Scheduled)
    fit(model, [QuantNoise(PQS, rate=0.3), swa(), keep, Quantize()], max_epochs=4)
    assert equal(as_quantized(keep.state), model)


@pytest.mark.parametrize("first", [True, False], ids=["noise_first", "pruning_first"])
def test_pruned_weights_stay_zero_through_noise_and_packing(first):
    policy = {"fc": Int(4), "head": Int(4)}
    keep, model, noise = Keep(), net(), QuantNoise(policy, rate=0.5)
    fit(model, [*([noise, pruning()] if first else [pruning(), noise]), keep, Quantize()])
    zero = keep.state["fc.weight"] == 0
    assert 0.3 < zero.float().mean() < 0.9
    assert equal(as_quantized(keep.state, policy), model)
    assert (model.fc.weight[zero] == 0).all()
    assert list(keep.state) == list(net().state_dict())


def test_pruning_trains_the_same_beside_noise_at_rate_zero():
    models = [net(), net()]
    for model, extra in zip(models, ([], [QuantNoise(PQS, rate=0.0)]), strict=True):
        fit(model, [*extra, pruning()])
    assert equal(*models)
    assert type(models[1].fc) is nn.Linear


@pytest.mark.parametrize("root", ROOTS)
def test_the_learning_rate_finder_probes_without_noise_and_leaves_it_on(root):
    module = __import__("importlib").import_module(root)
    seen = []
    watch = Callback()
    watch.on_train_batch_start = lambda trainer, model, *_: seen.append(type(model.fc).__name__)
    found = []
    for extra in ([QuantNoise(PQS, rate=0.5), Quantize(), watch], []):
        finder = module.callbacks.LearningRateFinder(num_training_steps=8)
        model = net(root)
        fit(model, [*extra, finder], root)
        found.append(finder.optimal_lr.results)
        if extra:
            assert type(model.fc).__name__ == "PackedLinear"
    assert found[0] == found[1]
    assert seen == ["NoisyLinear"] * 16


def test_a_summary_and_a_progress_bar():
    model = net()
    fit(model, [QuantNoise("int8"), Quantize()], enable_progress_bar=True, enable_model_summary=True)
    assert type(model.fc).__name__ == "PackedLinear"


def test_reduced_codebooks_are_said_once_in_a_fit():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit(net(), [QuantNoise({"fc": PQ(8, 256)}, 0.1), Quantize(path=None), ModelSize()])
    assert sum("fewer blocks" in str(warning.message) for warning in caught) == 1
