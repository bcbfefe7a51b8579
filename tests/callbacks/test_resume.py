"""A fit that goes on from a checkpoint, against the one that was never interrupted: bit for bit."""

import pytest
import torch
from fits import PQS, ROOTS, Net, checkpoint, equal, fit, net
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import LearningRateFinder
from torch.utils.data import DataLoader, TensorDataset

from lightning_qnoise import PQ, Int, LinearRate, Quantize, QuantNoise

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
)


class Same(Net):
    """Eight batches with the same rows: Lightning does not restore the place in a plain DataLoader."""

    def train_dataloader(self):
        x, y = next(iter(super().train_dataloader()))
        return DataLoader(TensorDataset(x.repeat(8, 1), y.repeat(8)), 8)


SETTINGS = {
    "pq": {"policy": PQS, "rate": 0.5},
    "int8": {"policy": "int8", "rate": LinearRate(0.2, 0.9)},
    "mean": {"policy": PQS, "rate": 0.5, "kind": "mean"},
    "steps": {"policy": PQS, "rate": 0.5, "refresh": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_from_every_epoch_and_from_within_one(name):
    whole = net(cls=Same)
    fit(whole, [QuantNoise(**SETTINGS[name]), checkpoint(every_n_train_steps=4)], max_epochs=3)
    for path in ("epoch=0-step=8", "epoch=0-step=4", "epoch=1-step=12"):
        resumed = net(cls=Same, seed=9)
        fit(resumed, [QuantNoise(**SETTINGS[name])], max_epochs=3, ckpt_path=f"ckpt/{path}.ckpt")
        assert equal(resumed, whole), path


@pytest.mark.parametrize("root", ROOTS)
def test_from_an_epoch_end_checkpoint(root):
    whole = net(root)
    fit(whole, [QuantNoise(PQS, rate=0.5), checkpoint(root)], root, max_epochs=3)
    resumed = net(root, seed=9)
    fit(resumed, [QuantNoise(PQS, rate=0.5)], root, max_epochs=3, ckpt_path="ckpt/epoch=1-step=16.ckpt")
    assert equal(resumed, whole)


def test_the_state_matters():
    """Without it the same fit goes elsewhere, so the tests above can fail."""
    whole = net()
    fit(whole, [QuantNoise(PQS, rate=0.5), checkpoint()])
    state = torch.load("ckpt/epoch=0-step=8.ckpt")
    for key, value in (("batches", 0), ("targets", {})):
        changed = {**state, "callbacks": {"QuantNoise": {**state["callbacks"]["QuantNoise"], key: value}}}
        torch.save(changed, "changed.ckpt")
        resumed = net()
        fit(resumed, [QuantNoise(PQS, rate=0.5)], ckpt_path="changed.ckpt")
        assert not equal(resumed, whole), key


def test_from_a_checkpoint_that_is_saved_after_the_fit():
    whole, first, second = net(), net(), net(seed=9)
    fit(whole, [QuantNoise(PQS, rate=0.5)], max_epochs=2)
    fit(first, [QuantNoise(PQS, rate=0.5)], max_epochs=1, enable_checkpointing=False).save_checkpoint("after.ckpt")
    fit(second, [QuantNoise(PQS, rate=0.5)], max_epochs=2, ckpt_path="after.ckpt")
    assert equal(second, whole)


def test_the_learning_rate_finder_leaves_the_state_of_a_resumed_fit():
    callbacks = lambda: [QuantNoise(PQS, rate=0.5), LearningRateFinder(num_training_steps=4)]  # noqa: E731
    fit(net(), [QuantNoise(PQS, rate=0.5), checkpoint()])
    seen = {}

    class Read(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            seen.setdefault("state", trainer.callbacks[1].state_dict())

    made = callbacks()
    fit(net(), [*made, Read()], ckpt_path="ckpt/epoch=0-step=8.ckpt")
    assert seen["state"]["batches"] == 9
    assert seen["state"]["targets"].keys() == {"fc.weight", "head.weight"}


def test_accumulation_and_a_resume_in_its_middle_is_left_to_lightning():
    whole, resumed = net(), net(seed=9)
    options = {"accumulate_grad_batches": 2, "max_epochs": 3}
    fit(whole, [QuantNoise(PQS, rate=0.5), checkpoint()], **options)
    fit(resumed, [QuantNoise(PQS, rate=0.5)], ckpt_path="ckpt/epoch=1-step=8.ckpt", **options)
    assert equal(resumed, whole)


@pytest.mark.parametrize("policy", ["int8", {"fc": PQ(4, 8)}, {"head": Int(4)}])
def test_a_checkpoint_of_another_policy_starts_new_codebooks(policy):
    fit(net(), [QuantNoise({"fc": PQ(8, 16)}, rate=0.5), checkpoint()])
    model = net()
    fit(model, [QuantNoise(policy, rate=0.5)], ckpt_path="ckpt/epoch=0-step=8.ckpt")
    assert type(model) is Net


def test_a_plain_checkpoint_resumes_with_noise_and_a_noisy_one_without():
    plain, noisy = net(), net()
    fit(plain, [checkpoint(dirpath="plain")])
    fit(noisy, [QuantNoise(PQS, rate=0.5), checkpoint(dirpath="noisy")])
    on, off = net(seed=9), net(seed=9)
    fit(on, [QuantNoise(PQS, rate=0.5)], ckpt_path="plain/epoch=0-step=8.ckpt")
    assert not equal(on, plain)
    with pytest.warns(UserWarning, match="'QuantNoise'.*no longer present|callbacks.*QuantNoise"):
        fit(off, ckpt_path="noisy/epoch=0-step=8.ckpt")
    assert not equal(off, noisy)


def test_the_checkpoint_of_a_finished_run_packs():
    first = net()
    fit(first, [QuantNoise(PQS, rate=0.5), Quantize(path=None), checkpoint()])
    again = net(seed=9)
    done = fit(again, [QuantNoise(PQS, rate=0.5), Quantize()], ckpt_path="ckpt/epoch=1-step=16.ckpt")
    assert equal(again, first)
    assert type(again.fc).__name__ == "PackedLinear"
    assert done.callback_metrics["size/compression"] > 1
