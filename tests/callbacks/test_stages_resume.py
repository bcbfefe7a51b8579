"""A fit that goes on from a checkpoint of any moment of its stages, against the one that was never interrupted."""

from pathlib import Path

import pytest
import torch
from fits import ROOTS, Net, checkpoint, equal, fit, net
from pytorch_lightning import Callback, callbacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qnoise import PQ, Finetune, Int, LinearRate, Quantize, QuantNoise, load

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
)
PQS = {"fc": PQ(8, 16), "head": PQ(8, 4)}
MIXED = {"fc": Int(4), "head": PQ(8, 4)}
LAST = {"fc": PQ(8, 16), "head": Int(4)}
RATE = LinearRate(0.2, 0.9)


class Same(Net):
    """Eight batches with the same rows: Lightning does not restore the place in a plain DataLoader."""

    def train_dataloader(self):
        x, y = next(iter(super().train_dataloader()))
        return DataLoader(TensorDataset(x.repeat(8, 1), y.repeat(8)), 8)


class Seen(Callback):
    """The teacher's weights, and how many batches each stage had."""

    def __init__(self, staged):
        self.staged, self.batches, self.teachers = staged, [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        work = self.staged._work
        self.batches.append(work.current)
        if work.current and work._guide is not None:
            self.teachers.append(work._guide.teacher.fc.weight.detach().clone())


SETTINGS = {
    "pq": {},
    "tied": {"reassign": False},
    "int first": {"policy": MIXED},
    "int last": {"policy": LAST, "reassign": False},
    "steps": {"steps": [4, 12]},
    "after steps": {"epochs": [1, 2]},
    "other steps": {"steps": [6, 11]},
    "epochs": {"epochs": [2, 1], "guidance": None},
    "no teacher": {"guidance": None, "reassign": False},
    "sgd": {"optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)},
}
SLOW = ["sgd", "no teacher", "int last", "other steps"]
DEFAULT = [name for name in SETTINGS if name not in SLOW]


def staged(policy=PQS, stages=("fc", "head"), path=None, rate=RATE, **finetune):
    made = Quantize(policy, stages=list(stages), path=path, finetune=Finetune(**finetune))
    noise = QuantNoise(policy, rate=rate, refresh=3)
    return [noise, made, Seen(made)]


def steps(folder="ckpt"):
    return sorted(Path(folder).glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[-1]))


def same_rows(first, second):
    """Records agree."""
    assert [row["name"] for row in first] == [row["name"] for row in second]
    for one, other in zip(first, second, strict=True):
        assert one == other


@pytest.mark.parametrize("name", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_from_every_moment(name):
    whole, listed = net(cls=Same, lr=0.02), staged(**SETTINGS[name])
    length = {"max_steps": 12} if name in ("steps", "after steps") else {}  # ends within an epoch
    fit(whole, [*listed, checkpoint(every_n_train_steps=4)], **length)
    of = dict(enumerate(listed[2].batches, start=1))
    paths = steps()
    assert len(paths) == len(of) // 4
    assert len({of[int(path.stem.split("=")[-1])] for path in paths}) == 3
    for path in paths:
        resumed, again = net(cls=Same, seed=9, lr=0.02), staged(**SETTINGS[name])
        fit(resumed, again, ckpt_path=path, **length)
        assert equal(resumed, whole), path
        assert again[2].batches == listed[2].batches[len(of) - len(again[2].batches) :]
        step = int(path.stem.split("=")[-1])
        assert len(again[2].batches) == len(of) - step
        assert all(torch.equal(teacher, listed[2].teachers[0]) for teacher in again[2].teachers)
        assert again[0]._batches == listed[0]._batches
        same_rows(again[1]._record.rows, listed[1]._record.rows)


@pytest.mark.parametrize("root", ROOTS)
def test_from_every_epoch(root):
    whole = net(root)
    fit(whole, [*staged(epochs=2), checkpoint(root)], root, max_epochs=1)
    assert len(steps()) == 5
    for path in steps():
        resumed = net(root, seed=9)
        fit(resumed, staged(epochs=2), root, max_epochs=1, ckpt_path=path)
        assert equal(resumed, whole), path


@pytest.mark.parametrize(
    ("finetune", "options"),
    [
        ({"steps": [3, 13]}, {}),
        ({}, {"accumulate_grad_batches": 2}),
        ({"steps": 5}, {"accumulate_grad_batches": 3}),
        ({}, {"max_steps": 5, "max_epochs": -1}),
        ({}, {"check_val_every_n_epoch": 2}),
        ({}, {"num_sanity_val_steps": 1}),
        ({"steps": 4, "rate": 0.5}, {"max_epochs": 0}),
        ({"dropout": True}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "bf16-true"}),
        ({"reassign": False}, {"precision": "bf16-true"}),
    ],
)
def test_from_epochs_of_other_fits(finetune, options):
    whole, listed, keep = net(), staged(**finetune), checkpoint(save_on_train_epoch_end=True)
    made = fit(whole, [*listed, keep], **options)
    assert steps()
    for path in steps():
        resumed, again = net(seed=9), staged(**finetune)
        other = fit(resumed, again, **options, ckpt_path=path)
        assert equal(resumed, whole), path
        assert (other.max_epochs, other.max_steps) == (made.max_epochs, made.max_steps)
        assert other.global_step == made.global_step
        same_rows(again[1]._record.rows, listed[1]._record.rows)


def test_from_the_last_and_from_after_the_fit():
    whole, listed = net(cls=Same), staged()
    made = fit(whole, [*listed, checkpoint(save_top_k=0, save_last=True)])
    made.save_checkpoint("after.ckpt")
    for path in ("ckpt/last.ckpt", "after.ckpt"):
        resumed, again = net(cls=Same, seed=9), staged(path="out.safetensors")
        fit(resumed, again, ckpt_path=path)
        assert not again[2].batches
        assert equal(resumed, whole) or path == "after.ckpt"  # there the codewords come in another order
        assert torch.equal(resumed.fc.weight, whole.fc.weight)
        assert torch.equal(resumed.head.weight, whole.head.weight)
        assert equal(load(net(cls=Same), "out.safetensors"), resumed)
        n_rows = 4 if path == "ckpt/last.ckpt" else 2  # codewords are rounded after the last stage
        same_rows(again[1]._record.rows[:n_rows], listed[1]._record.rows[:n_rows])
        assert len(again[1]._record.rows) == 4


def test_what_is_left_of_the_fit_does_not_come_twice():
    """A trainer's callbacks and limits after a resumed fit; early stopping and averages end before the stages."""

    def made():
        return [callbacks.EarlyStopping("val_loss", patience=1), callbacks.EMAWeightAveraging(decay=0.5), *staged()]

    whole = net(cls=Same)
    fit(whole, [*made(), checkpoint(every_n_train_steps=4)], max_epochs=2)
    for path in steps()[4:]:
        resumed, listed = net(cls=Same, seed=9), made()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pytorch_lightning.callbacks.weight_averaging.rank_zero_warn", lambda *args, **kwargs: None)
            done = fit(resumed, listed, max_epochs=2, ckpt_path=path)
        assert equal(resumed, whole), path
        assert done.callbacks[:5] == listed
        assert (done.max_epochs, done.max_steps) == (2, -1)


def test_the_best_is_chosen_anew_after_a_resume():
    keep = checkpoint(dirpath="best", monitor="val_loss", save_top_k=1)
    whole = net(cls=Same)
    fit(whole, [*staged(epochs=[1, 3]), keep, checkpoint()], max_epochs=2)
    for path in steps()[1:]:
        again = checkpoint(dirpath="best", monitor="val_loss", save_top_k=1)
        fit(net(cls=Same, seed=9), [*staged(epochs=[1, 3]), again], max_epochs=2, ckpt_path=path)
        assert float(again.best_model_score) == float(keep.best_model_score), path
        state = torch.load(again.best_model_path)["callbacks"]["Quantize"]
        assert state["stage"] == 2


def test_from_a_fit_that_starts_with_the_best():
    def made():
        return Quantize(PQS, stages=["*"], start="best", path=None)

    def keep():
        return checkpoint(dirpath="best", monitor="val_loss", save_top_k=1)

    whole = net(cls=Same)
    fit(whole, [made(), keep(), checkpoint()], max_epochs=3)
    for path in steps():
        resumed = net(cls=Same, seed=9)
        fit(resumed, [made(), keep()], max_epochs=3, ckpt_path=path)
        assert equal(resumed, whole), path


class Stepped(Same):
    """Manual optimization."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("reassign", [True, False])
def test_manual_optimization(reassign):
    whole = net(cls=Stepped)
    fit(whole, [*staged(guidance=None, reassign=reassign), checkpoint(every_n_epochs=1)])
    for path in steps():
        resumed = net(cls=Stepped, seed=9)
        fit(resumed, staged(guidance=None, reassign=reassign), ckpt_path=path)
        assert equal(resumed, whole), path


def test_a_teacher_that_is_gone():
    fit(net(cls=Same), [*staged(), checkpoint(every_n_train_steps=4), checkpoint(dirpath="epochs")])
    Path("float.ckpt").rename("elsewhere.ckpt")
    paths = steps()
    fit(net(cls=Same), [*staged(), checkpoint(dirpath="epochs")], ckpt_path=paths[3])  # before the stages: a new one
    Path("float.ckpt").unlink()
    for path in paths[4:]:
        model = net(cls=Same)
        with pytest.raises(FileNotFoundError, match=r"teacher was written to .*float.ckpt, and that file is gone"):
            fit(model, staged(), ckpt_path=path)
        assert "training_step" not in model.__dict__
    fit(net(cls=Same), staged(), ckpt_path="epochs/epoch=3-step=32.ckpt")  # its work is done
    fit(net(cls=Same), staged(guidance=None), ckpt_path=paths[-2])


@pytest.mark.parametrize("stages", [["*"], None])
def test_a_checkpoint_of_other_stages(stages):
    fit(net(cls=Same), [*staged(), checkpoint()])
    path = steps()[-1]
    model = net(cls=Same)
    with pytest.raises(Exception, match=r"saved in stage 2 of other stages|current_epoch=3"):
        fit(model, [Quantize(PQS, stages=stages)], ckpt_path=path)


class Raises(Callback):
    """An error in stage 1."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 21:
            raise RuntimeError("no more")


@pytest.mark.parametrize("reassign", [True, False])
def test_from_what_is_saved_on_an_exception(reassign):
    whole, stopped, resumed = net(cls=Same), net(cls=Same), net(cls=Same, seed=9)
    fit(whole, [*staged(reassign=reassign), checkpoint()])
    keep = checkpoint(dirpath="saved", every_n_epochs=9, save_on_exception=True)
    with pytest.raises(RuntimeError, match="no more"):
        fit(stopped, [*staged(reassign=reassign), Raises(), keep])
    (path,) = steps("saved")
    fit(resumed, staged(reassign=reassign), ckpt_path=path)
    assert type(resumed.fc) is type(whole.fc)
    assert equal(resumed, whole)


class Normed(Same):
    """With BatchNorm, whose statistics a finished fit estimates anew."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.fc(x))))


def test_batch_norm():
    whole = net(cls=Normed)
    fit(whole, [*staged(), checkpoint(every_n_train_steps=8)])
    for path in steps():
        resumed = net(cls=Normed, seed=9)
        fit(resumed, staged(), ckpt_path=path)
        assert equal(resumed, whole), path
