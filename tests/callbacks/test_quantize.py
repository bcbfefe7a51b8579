"""Quantize: the packed model, what is logged, what is written, what checkpoints hold."""

import copy
from pathlib import Path

import pytest
import torch
from fits import ROOTS, LightningNet, Net, NoValidation, checkpoint, equal, fit, losses, net, rows
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_qnoise import PQ, Int, Quantize, QuantNoise, dequantize, load, quantize, size_table

POLICY = {"fc": PQ(8, 16), "head": Int(4)}
each_root = pytest.mark.parametrize("root", ROOTS)
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


class Keep(Callback):
    """Keeps a copy of the weights as they are before Quantize packs them."""

    def on_train_end(self, trainer, pl_module):
        self.state = copy.deepcopy(pl_module.state_dict())


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(next(iter(rows(64, 64)))[0])


@each_root
def test_the_model_is_packed_after_the_fit_as_by_hand(root):
    model, keep = net(root), Keep()
    fit(model, [QuantNoise(POLICY, rate=0.3), keep, Quantize(POLICY)], root)
    assert [type(model.fc).__name__, type(model.head).__name__] == ["PackedLinear", "PackedLinear"]
    by_hand = net(root, seed=5)
    by_hand.load_state_dict(keep.state)
    assert equal(quantize(by_hand, POLICY), model)
    assert torch.equal(logits(by_hand), logits(model))


@each_root
def test_metrics_of_the_packed_model_are_logged_beside_the_float_ones(root):
    model, keep = net(root), Keep()
    made = fit(model, [keep, Quantize({"*": Int(2)})], root, logger=CSVLogger("."))
    as_float = net(root)
    as_float.load_state_dict(keep.state)
    found = {name: float(value) for name, value in made.callback_metrics.items()}
    assert (found["val_loss"], found["val_acc"]) == pytest.approx(losses(as_float, rows(32)), abs=1e-6)
    expected = losses(model, rows(32))
    assert (found["quantized/val_loss"], found["quantized/val_acc"]) == pytest.approx(expected, abs=1e-6)
    assert found["quantized/val_loss"] != pytest.approx(found["val_loss"], abs=1e-3)
    table = size_table(model)
    assert found["size/total_mb"] == pytest.approx(table.total_mb)
    assert found["size/compression"] == pytest.approx(table.compression)
    lines = Path("lightning_logs/version_0/metrics.csv").read_text().splitlines()
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    assert float(last["quantized/val_loss"]) == found["quantized/val_loss"]
    assert float(last["size/total_mb"]) == pytest.approx(table.total_mb)
    assert last["step"] == "16"
    for book in (made.logged_metrics, made.progress_bar_metrics):
        assert float(book["val_acc"]) == found["val_acc"]


def test_checkpoints_and_early_stopping_do_not_see_the_second_validation():
    fits = []
    for extra in ([], [Quantize({"*": Int(2)})]):
        best = checkpoint(dirpath=f"ckpt{len(extra)}", monitor="val_loss", save_top_k=1)
        stop = EarlyStopping("val_loss", patience=1)
        seen = []
        watch = Callback()
        watch.on_validation_end = lambda *_, seen=seen: seen.append(1)
        fit(net(), [watch, *extra, stop, best])
        scores = list(best.best_k_models.values())
        fits.append((best.best_model_score, scores, stop.wait_count, stop.best_score, len(seen)))
    assert fits[0] == fits[1]


@each_root
def test_the_file_loads_into_a_fresh_model_with_equal_logits(root):
    model = net(root)
    fit(model, [Quantize(POLICY)], root)
    fresh = load(net(root, seed=5), "quantized.safetensors")
    assert torch.equal(logits(fresh), logits(model))
    assert size_table(fresh).bytes == size_table(model).bytes


def test_the_file_lies_in_the_logger_s_folder_and_path_names_it():
    fit(net(), [Quantize("int8", path="sub/small.safetensors")], logger=CSVLogger("logs", name="run"))
    assert [str(p) for p in Path(".").rglob("*.safetensors")] == ["logs/run/version_0/sub/small.safetensors"]


@pytest.mark.parametrize(("options", "path"), [({}, None), ({"fast_dev_run": True}, "x.safetensors")])
def test_no_file(options, path):
    model = net()
    made = fit(model, [Quantize("int8", path=path)], **options)
    assert not list(Path(".").rglob("*.safetensors"))
    assert type(model.fc).__name__ == "PackedLinear"
    assert "quantized/val_loss" in made.callback_metrics


@pytest.mark.parametrize(("cls", "options"), [(NoValidation, {}), (Net, {"limit_val_batches": 0})])
def test_a_fit_without_validation(cls, options):
    model = net(cls=cls)
    made = fit(model, [Quantize("int8")], **options)
    assert type(model.fc).__name__ == "PackedLinear"
    assert not [name for name in made.callback_metrics if name.startswith("quantized/")]
    assert made.callback_metrics["size/compression"] > 2


def test_evaluate_false_runs_no_second_validation():
    runs = []
    model = net()
    model.on_validation_start = lambda: runs.append(1)
    fit(model, [Quantize("int8", evaluate=False)])
    assert len(runs) == 2


def test_nan_at_the_end_raises_and_leaves_the_model_float():
    class Diverges(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.head.weight[0, :3] = float("nan")

    model = net()
    with pytest.raises(ValueError, match=r"layer 'head.weight': 3 of 128 values are NaN or Inf"):
        fit(model, [QuantNoise("int8"), Quantize("int8"), Diverges()], max_epochs=1)
    assert type(model) is Net
    assert (type(model.fc), type(model.head)) == (nn.Linear, nn.Linear)
    assert not list(Path(".").rglob("*.safetensors"))


@each_root
def test_testing_the_best_checkpoint_quantizes_it(root):
    model, best = net(root, lr=0.5), checkpoint(root, monitor="train_loss", mode="max", save_top_k=1)
    made = fit(model, [Quantize(POLICY), best], root)
    assert best.best_model_path != ""
    state = torch.load(best.best_model_path)["state_dict"]
    by_hand = net(root)
    by_hand.load_state_dict(state)
    expected = losses(quantize(by_hand, POLICY), rows(32))[0]
    assert not equal(by_hand, model)  # the best is not the last
    [found] = made.test(model, ckpt_path="best", verbose=False)
    assert found["test_loss"] == pytest.approx(expected, abs=1e-6)
    assert equal(by_hand, model)


@each_root
def test_the_last_checkpoint_loads_in_the_plain_class(root):
    model = net(root)
    fit(model, [QuantNoise(POLICY), Quantize(), checkpoint(root, every_n_epochs=5, save_last=True)], root)
    cls = {"pytorch_lightning": Net, "lightning.pytorch": LightningNet}[root]
    loaded = cls.load_from_checkpoint("ckpt/last.ckpt")
    assert list(loaded.state_dict()) == list(net(root).state_dict())
    packed = logits(model)
    torch.testing.assert_close(logits(loaded), packed)
    assert equal(loaded, dequantize(model))


def test_a_fit_goes_on_from_the_last_checkpoint():
    first = net()
    fit(first, [QuantNoise(POLICY), Quantize(), checkpoint(every_n_epochs=5, save_last=True)])
    again = net()
    made = fit(again, [QuantNoise(POLICY), Quantize()], max_epochs=3, ckpt_path="ckpt/last.ckpt")
    assert made.global_step == 24
    assert type(again.fc).__name__ == "PackedLinear"


@pytest.mark.parametrize("interrupt", [ZeroDivisionError(), KeyboardInterrupt()])
def test_an_interrupted_fit_leaves_a_plain_model_and_no_file(interrupt):
    class Break(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 5:
                raise interrupt

    model = net()
    with pytest.raises((ZeroDivisionError, SystemExit)):
        fit(model, [QuantNoise("int8"), Quantize(), Break()])
    assert (type(model), type(model.fc)) == (Net, nn.Linear)
    assert not list(Path(".").rglob("*.safetensors"))


def test_the_policy_is_that_of_quant_noise_unless_there_is_an_own_one():
    for callbacks, schemes in (
        ([QuantNoise(POLICY), Quantize()], ["PQWeight", "IntWeight"]),
        ([Quantize(), QuantNoise(POLICY)], ["PQWeight", "IntWeight"]),
        ([Quantize(), QuantNoise(POLICY, enabled=False)], ["PQWeight", "IntWeight"]),
        ([QuantNoise(POLICY), Quantize("int8")], ["IntWeight", "IntWeight"]),
    ):
        model = net()
        fit(model, callbacks, max_epochs=1)
        assert [type(layer.packed("weight")).__name__ for layer in (model.fc, model.head)] == schemes


@pytest.mark.parametrize(
    "callbacks",
    [[Quantize("int8", enabled=False)], [QuantNoise(None), Quantize()], [Quantize(enabled=False)]],
    ids=["off", "adopted_none", "off_without_policy"],
)
def test_switched_off_it_does_nothing(callbacks):
    model, plain = net(), net()
    made = fit(model, callbacks)
    fit(plain)
    assert equal(model, plain)
    assert type(model.fc) is nn.Linear
    assert not [name for name in made.callback_metrics if "size" in name or "quantized" in name]
    assert not list(Path(".").rglob("*.safetensors"))


def test_one_object_serves_two_fits():
    noise, pack = QuantNoise(POLICY, rate=0.5), Quantize()
    models = [net(), net()]
    for model in models:
        fit(model, [noise, pack])
    assert equal(*models)
    dequantize(models[0])
    fit(models[0], [noise, pack])
    assert type(models[0].fc).__name__ == "PackedLinear"
