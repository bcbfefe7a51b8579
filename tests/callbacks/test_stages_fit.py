"""Quantization in stages: one more run of the fit loop for each, seen by Lightning and its callbacks."""

import copy
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fits import PQS, ROOTS, Manual, Net, NoValidation, checkpoint, equal, fit, losses, net, rows, trainer
from pytorch_lightning import Callback, callbacks
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_qnoise import Finetune, Int, Quantize, QuantNoise, WarmupCosine, load
from lightning_qnoise.distill import Guidance, soft_targets
from lightning_qnoise.layers import packed_weights

TWO = ["fc", "head"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
    "ignore:The checkpoint was not created with WeightAveraging:UserWarning",
)


class Watch(Callback):
    """Writes down the hooks, and what every batch is trained with; keeps the weights of the last one."""

    def __init__(self):
        self.hooks, self.batches, self.lrs, self.stages = [], [], [], []

    def on_fit_start(self, trainer, pl_module):
        self.expected = trainer.estimated_stepping_batches

    def on_train_start(self, trainer, pl_module):
        self.hooks.append("start")

    def on_train_epoch_start(self, trainer, pl_module):
        self.hooks.append("epoch")

    def on_validation_start(self, trainer, pl_module):
        self.hooks.append("val")

    def on_train_end(self, trainer, pl_module):
        self.hooks.append("end")
        self.state = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.lrs.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx))
        self.stages.append(float(trainer.progress_bar_metrics.get("quantize/stage", 0)))


def quantize(stages=("*",), start="last", path=None, **finetune):
    return Quantize(PQS, stages=list(stages), finetune=Finetune(**finetune), start=start, path=path)


def n_blocks(weight):
    return len(weight.reshape(-1, 8).unique(dim=0))


@pytest.mark.parametrize("root", ROOTS)
def test_every_stage_is_a_run_of_the_fit_loop(root):
    model, early, late = net(root), Watch(), import_module(root).Callback()
    ends = []
    late.on_train_end = lambda *_: ends.append(len(early.hooks))
    bars = {"enable_progress_bar": True, "enable_model_summary": True}
    made = fit(model, [early, quantize(TWO, epochs=[1, 2]), late], root, **bars)
    epoch = ["epoch", "val"]
    assert early.hooks == ["start", *epoch, *epoch, "end", "start", *epoch, "end", "start", *epoch, *epoch, "end"]
    assert len(ends) == 3
    assert early.expected == 16
    assert early.batches == [(epoch, batch) for epoch in range(5) for batch in range(8)]
    assert early.stages == [0] * 16 + [1] * 8 + [2] * 16
    for name, packed in packed_weights(model):
        assert torch.equal(packed.decode(), early.state[name].half().float())
        blocks, codes = early.state[name].reshape(-1, 8), packed.indices().flatten()
        assert all((blocks[codes == code] == blocks[codes == code][:1]).all() for code in codes.unique())
        assert n_blocks(early.state[name]) <= PQS[name.split(".")[0]].n_centroids
    assert (made.max_epochs, made.max_steps, made.global_step) == (2, -1, 40)
    assert made.callbacks[0] is early and late in made.callbacks
    assert "training_step" not in model.__dict__
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert model.dropout.p == model.hparams.dropout


class OtherData(Net):
    """Batches that are not a multiple of the accumulation."""

    def train_dataloader(self):
        return rows(40)


LENGTHS = [
    ({"epochs": 2}, {}, [16, 16, 16]),
    ({"steps": 3}, {}, [16, 3, 3]),
    ({"steps": [11, 20]}, {}, [16, 11, 20]),
    ({"epochs": [2, 1]}, {"accumulate_grad_batches": 2}, [16, 16, 8]),
    ({"steps": [3, 5]}, {"accumulate_grad_batches": 2}, [16, 6, 10]),
    ({"steps": 3}, {"fast_dev_run": True}, [1, 1, 1]),
    ({}, {"fast_dev_run": 2}, [2, 2, 2]),
    ({}, {"max_steps": 5}, [5, 8, 8]),
    ({"steps": 4}, {"max_steps": 11}, [11, 4, 4]),
    ({}, {"limit_train_batches": 3}, [6, 3, 3]),
    ({}, {"max_epochs": 0}, [0, 8, 8]),
    ({"steps": 2}, {"max_epochs": 0}, [0, 2, 2]),
    ({}, {"max_steps": 0}, [0, 8, 8]),
    ({"epochs": 2}, {"check_val_every_n_epoch": 2, "max_epochs": 1}, [8, 16, 16]),
    ({}, {"val_check_interval": 3}, [16, 8, 8]),
    ({}, {"reload_dataloaders_every_n_epochs": 1}, [16, 8, 8]),
]


@pytest.mark.parametrize(("finetune", "options", "lengths"), LENGTHS)
def test_lengths_and_learning_rates(finetune, options, lengths):
    watch, model = Watch(), net()
    fit(model, [watch, quantize(TWO, guidance=None, lr=0.01, **finetune)], **options)
    assert [watch.stages.count(stage) for stage in (0, 1, 2)] == lengths
    assert watch.stages == sorted(watch.stages)
    every = options.get("accumulate_grad_batches", 1)
    for stage in (1, 2):
        lrs = [lr for lr, of in zip(watch.lrs, watch.stages, strict=True) if of == stage]
        n = -(-len(lrs) // every)
        factors = [WarmupCosine()((step + 1) / (n + 1)) for step in range(n)]
        assert [lr[0] for lr in lrs[::every]] == pytest.approx([0.01 * factor for factor in factors])
        assert [lr[-1] for lr in lrs[::every]] == pytest.approx([0.01 / 3 * factor for factor in factors])
    assert type(model.fc).__name__ == type(model.head).__name__ == "PackedLinear"


def test_accumulation_over_an_odd_epoch():
    watch, model = Watch(), net(cls=OtherData)
    made = fit(model, [watch, quantize(guidance=None, epochs=2)], accumulate_grad_batches=2)
    assert watch.batches[-1] == (3, 4)
    assert made.global_step == 12
    assert min(lr[0] for lr in watch.lrs[10:]) > 0


class WithSchedule(Net):
    """Two groups of parameters, and a schedule by name."""

    kind = "onecycle"

    def configure_optimizers(self):
        groups = [{"params": self.fc.parameters(), "name": "body"}, {"params": self.head.parameters(), "name": "top"}]
        groups[1]["lr"] = 0.02
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        total = self.trainer.estimated_stepping_batches
        schedulers = torch.optim.lr_scheduler
        config = {
            "onecycle": lambda: {"scheduler": schedulers.OneCycleLR(optimizer, [0.05, 0.02], 16), "interval": "step"},
            "warmup": lambda: {"scheduler": schedulers.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))},
            "linear": lambda: {"scheduler": schedulers.LinearLR(optimizer, 0.1)},
            "plateau": lambda: {"scheduler": schedulers.ReduceLROnPlateau(optimizer), "monitor": "val_loss"},
            "cosine": lambda: {"scheduler": schedulers.CosineAnnealingLR(optimizer, total), "interval": "step"},
        }[self.kind]()
        return {"optimizer": optimizer, "lr_scheduler": config}


@pytest.mark.parametrize("lr", [None, 0.001])
@pytest.mark.parametrize("kind", ["onecycle", "warmup", "linear", "plateau", "cosine"])
def test_the_peak_rates_are_those_before_the_users_schedule(kind, lr, monkeypatch):
    monkeypatch.setattr(WithSchedule, "kind", kind)
    plain, watch = Watch(), Watch()
    fit(net(cls=WithSchedule), [plain])
    monitor = callbacks.LearningRateMonitor()
    finetune = {"guidance": None, "lr": lr, "schedule": lambda progress: 0.5}
    fit(net(cls=WithSchedule), [watch, monitor, quantize(TWO, **finetune)], logger=CSVLogger("."))
    assert watch.lrs[:16] == plain.lrs
    assert watch.expected == plain.expected == 16
    peaks = [0.05, 0.02] if lr is None else [lr, lr]
    first = [peaks[0], peaks[1], peaks[0] / 3]
    for found, wanted in ((watch.lrs[16:24], first), (watch.lrs[24:], [*first, peaks[1] / 3])):
        assert all(lrs == pytest.approx([0.5 * lr for lr in wanted]) for lrs in found)


class OfNames(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.named_parameters(), lr=0.05)


class WithParts(Net):
    """Weight decay in one group, none in the other."""

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim == 1]
        return torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": rest}], lr=0.05)


@pytest.mark.parametrize("cls", [OfNames, WithParts])
@pytest.mark.parametrize("reassign", [True, False])
def test_groups_of_parameters(cls, reassign):
    model = net(cls=cls)
    fit(model, [checkpoint(), quantize(TWO, reassign=reassign)])
    assert type(model.head).__name__ == "PackedLinear"
    fit(net(cls=cls), [quantize(TWO, reassign=reassign)], ckpt_path="ckpt/epoch=3-step=32.ckpt")


def test_another_optimizer():
    made, model, watch = [], net(), Watch()

    def sgd(parameters):
        made.append(list(parameters))
        return torch.optim.SGD(made[-1], lr=0.1, momentum=0.9)

    model.fc.bias.requires_grad_(False)
    fit(model, [watch, quantize(TWO, optimizer=sgd, schedule=lambda _: 1.0)])
    assert [len(parameters) for parameters in made] == [3, 3]
    assert watch.lrs[16] == [0.1, pytest.approx(0.1 / 3)]


def test_the_records_of_the_stages_are_logged():
    callback, logger = quantize(TWO, path="out.safetensors", steps=[3, 6]), CSVLogger(".", name="logs")
    model = net()
    made = fit(model, [callback, callbacks.LearningRateMonitor()], logger=logger)
    rows_ = callback._record.rows
    assert [row["name"] for row in rows_] == ["float", "stage 1", "stage 2", "packed"]
    sizes = [row["bytes"] for row in rows_]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] == round(1e6 * float(made.callback_metrics["size/total_mb"]))
    assert rows_[2]["metrics"]["val_loss"] == pytest.approx(rows_[3]["metrics"]["val_loss"], abs=1e-3)
    metrics = logged(logger)
    after = [row for row in metrics if row["size/total_mb"]]
    assert sorted({int(row["step"]) for row in after}) == [19, 25]
    values = [float(row["quantized/val_loss"]) for row in after]
    assert values[0] == pytest.approx(rows_[1]["metrics"]["val_loss"])
    assert values[-1] == pytest.approx(rows_[3]["metrics"]["val_loss"])
    assert float(made.callback_metrics["quantized/val_loss"]) == pytest.approx(losses(model, rows(32))[0], abs=1e-6)
    stages = [(int(row["step"]), float(row["quantize/stage"])) for row in metrics if row["quantize/stage"]]
    assert {stage for _, stage in stages} == {1, 2}
    assert all((stage == 1) == (step < 19) for step, stage in stages)
    assert equal(load(net(), f"{logger.log_dir}/out.safetensors"), model)
    assert Path(logger.log_dir, "float.ckpt").exists() == bool(made.checkpoint_callbacks)


def logged(logger):
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    return [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]


def test_early_stopping_ends_the_users_epochs_and_not_the_stages():
    watch, model = Watch(), net()
    early = callbacks.EarlyStopping("val_loss", patience=1, min_delta=9.0)
    made = fit(model, [early, watch, quantize(TWO, epochs=[3, 2])], max_epochs=9)
    assert [watch.stages.count(stage) for stage in (0, 1, 2)] == [16, 24, 16]
    assert (made.max_epochs, made.callbacks[0]) == (9, early)
    assert (early.stopped_epoch, early.wait_count) == (1, 1)


def test_no_time_left_is_time_for_the_stages():
    watch, model = Watch(), net()
    timer = callbacks.Timer({"seconds": 50})
    watch.on_train_epoch_end = lambda trainer, _: setattr(timer, "_offset", 99)
    made = fit(model, [watch, quantize(TWO), timer, checkpoint()], max_epochs=-1)
    assert [watch.stages.count(stage) for stage in (0, 1, 2)] == [9, 8, 8]
    assert timer in made.callbacks
    assert made.max_epochs == -1
    resumed, path = net(), "ckpt/epoch=0-step=8.ckpt"
    with pytest.warns(UserWarning, match="ended before its first step"):
        fit(resumed, [quantize(TWO), callbacks.Timer({"seconds": 50})], max_epochs=-1, ckpt_path=path)
    assert type(resumed.fc).__name__ == "PackedLinear"


def test_without_validation():
    model, callback = net(cls=NoValidation), quantize(TWO)
    made = fit(model, [callback])
    assert [row["metrics"] for row in callback._record.rows] == [{}] * 4
    assert made.callback_metrics["size/compression"] > 4
    fit(net(), [Quantize(PQS, stages="joint", evaluate=False, finetune=Finetune(steps=1))])


class ManualScheduled(Manual):
    """Two optimizers and a schedule, stepped by hand."""

    def training_step(self, batch, batch_idx):
        loss = Net.training_step(self, batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        made = [torch.optim.SGD(self.fc.parameters(), lr=0.1), torch.optim.Adam(self.head.parameters(), lr=0.02)]
        return made, [torch.optim.lr_scheduler.OneCycleLR(made[0], 0.1, 1000, cycle_momentum=False)]


@pytest.mark.parametrize("reassign", [True, False])
@pytest.mark.parametrize("cls", [Manual, ManualScheduled])
def test_manual_optimization(cls, reassign):
    watch, model = Watch(), net(cls=cls)
    made = fit(model, [watch, quantize(TWO, guidance=None, reassign=reassign, epochs=[1, 2])])
    assert [watch.stages.count(stage) for stage in (0, 1, 2)] == [16, 8, 16]
    assert all(n_blocks(watch.state[name]) <= k for name, k in (("fc.weight", 16), ("head.weight", 4)))
    assert equal_decoded(model, watch.state)
    per_batch = 2 if cls is ManualScheduled else 1
    assert made.global_step == 40 * per_batch
    if cls is Manual:
        assert all(lr == [0.05] for lr in watch.lrs)
    else:
        assert watch.lrs[0] == watch.lrs[16] == watch.lrs[24] != watch.lrs[15]
    with pytest.raises(ValueError, match=r"manual optimization: pass Finetune\(guidance=None\)"):
        fit(net(cls=cls), [quantize(TWO)])


def equal_decoded(model, state):
    return all(torch.equal(packed.decode(), state[name].half().float()) for name, packed in packed_weights(model))


def swa():
    return callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, device=None)


def pruning():
    return callbacks.ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=None)


def ema():
    return callbacks.EMAWeightAveraging(decay=0.5)


def averaging():
    return callbacks.WeightAveraging()


class Before(Callback):
    """The weights that quantization starts from."""

    def on_train_end(self, trainer, pl_module):
        self.__dict__.setdefault("state", copy.deepcopy(pl_module.state_dict()))


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("writer", [swa, pruning, ema, averaging])
def test_what_writes_weights_at_the_end_does_so_before_the_stages(writer):
    alone, before, watch, model = Before(), Before(), Watch(), net(cls=Scheduled)
    made = fit(net(cls=Scheduled), [writer(), alone], max_epochs=3)
    assert made.callbacks[1] is alone
    last = checkpoint(every_n_epochs=9, save_last=True)
    made = fit(model, [writer(), before, watch, quantize(TWO, guidance=None), last], max_epochs=3)
    assert equal(before.state, alone.state)
    assert equal_decoded(model, watch.state)
    assert [watch.stages.count(stage) for stage in (0, 1, 2)] == [24, 8, 8]
    expected = losses(model, rows(32))[0]
    assert float(made.callback_metrics["quantized/val_loss"]) == pytest.approx(expected, abs=1e-6)
    assert made.validate(model, verbose=False)[0]["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert losses(Net.load_from_checkpoint("ckpt/last.ckpt"), rows(32))[0] == pytest.approx(expected, abs=1e-4)


def test_pruned_blocks_stay_zero():
    before, model = Before(), net()
    structured = callbacks.ModelPruning(
        "ln_structured", [(model.fc, "weight")], ["weight"], False, 0.5, pruning_dim=0, pruning_norm=1
    )
    fit(model, [structured, before, quantize(TWO)])
    zero = before.state["fc.weight"].view(-1, 8).abs().sum(dim=1) == 0
    assert zero.any()
    assert (model.fc.weight.view(-1, 8)[zero] == 0).all()


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_profilers(profiler):
    fit(net(), [quantize(TWO)], profiler=profiler)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
def test_progress_bars_and_learning_rate_monitors(root, name):
    module = import_module(f"{root}.callbacks")
    logger = import_module(f"{root}.loggers").CSVLogger(".")
    model, extra = net(root), [getattr(module, name)(), module.LearningRateMonitor("step")]
    fit(model, [*extra, quantize(TWO)], root, enable_progress_bar=True, logger=logger)
    column = {float(row["lr-AdamW/pg2"]) for row in logged(logger) if row.get("lr-AdamW/pg2")}
    assert len(column) >= 7


@pytest.mark.parametrize("root", ROOTS)
def test_best_and_last_are_quantized(root):
    model, keep = net(root), checkpoint(root, monitor="val_loss", save_top_k=1, save_last=True)
    made = fit(model, [quantize(TWO, epochs=[2, 3], path=None), keep], root, max_epochs=4)
    assert keep.best_model_path == made.checkpoint_callback.best_model_path
    best = torch.load(keep.best_model_path)
    assert best["epoch"] in (6, 7, 8)
    assert best["callbacks"]["Quantize"]["stage"] == 2
    assert (n_blocks(best["state_dict"]["fc.weight"]), n_blocks(best["state_dict"]["head.weight"])) <= (16, 4)
    assert float(keep.best_model_score) == min(float(v) for v in keep.best_k_models.values())
    plain = net(root)
    plain.load_state_dict(best["state_dict"])
    tested = made.test(model, ckpt_path="best", verbose=False)[0]["test_loss"]
    assert tested == pytest.approx(losses(plain, rows(32))[0], abs=1e-3)
    assert type(model.fc).__name__ == "PackedLinear"
    expected = float(made.callback_metrics["test_loss"])
    assert expected == pytest.approx(tested)
    last = made.test(model, ckpt_path="last", verbose=False)[0]["test_loss"]
    plain.load_state_dict(torch.load("ckpt/last.ckpt")["state_dict"])
    assert last == pytest.approx(losses(plain, rows(32))[0], abs=1e-5)
    assert made.test(plain, ckpt_path="best", verbose=False)[0]["test_loss"] == pytest.approx(tested, abs=1e-3)


def test_a_best_of_the_float_model_is_forgotten_without_another():
    keep = checkpoint(monitor="val_loss", save_top_k=1)
    fit(net(), [quantize(steps=2), keep], check_val_every_n_epoch=2)
    assert keep.best_model_path == ""


def test_a_start_from_the_best_weights():
    class Diverges(Net):
        """Gets worse from the second epoch on."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if self.trainer.current_epoch != 2 else -loss

    before, by_hand, model = Before(), net(cls=Diverges), net(cls=Diverges)
    keep = checkpoint(monitor="val_loss", save_top_k=1)
    fit(by_hand, [before, keep], max_epochs=3)
    best = torch.load(keep.best_model_path)["state_dict"]
    assert not equal(best, before.state)
    seen = []
    callback = quantize(TWO, start="best", guidance=None)
    note = callback._note
    callback._note = lambda *args: (seen.append(copy.deepcopy(args[1].state_dict())), note(*args))
    fit(model, [callback, checkpoint(dirpath="two", monitor="val_loss", save_top_k=1)], max_epochs=3)
    assert equal(seen[0], best)
    assert callback._record.rows[0]["metrics"]["val_loss"] == pytest.approx(float(keep.best_model_score))
    one_shot = net(cls=Diverges)
    fit(one_shot, [Quantize("int8", start="best"), checkpoint(dirpath="three", monitor="val_loss")], max_epochs=3)
    loaded = net()
    loaded.load_state_dict(best)
    assert torch.equal(one_shot.fc.weight, Int(8).encode(loaded.fc.weight).decode())


def test_the_best_needs_a_checkpoint_callback():
    for extra in ([], [checkpoint()]):
        with pytest.raises(ValueError, match="needs a ModelCheckpoint with a monitor"):
            fit(net(), [quantize(start="best"), *extra])
    with pytest.warns(UserWarning, match="quantization starts from the last weights"):
        fit(net(), [quantize(start="best"), checkpoint(monitor="val_loss")], max_epochs=0)


class Teacher(Callback):
    """Looks at the teacher of every stage while it guides."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        quantize = next(callback for callback in trainer.callbacks if isinstance(callback, Quantize))
        if not quantize._work.current:
            return
        teacher = quantize._work._guide.teacher
        parameters = list(teacher.parameters())
        trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert not teacher.training and not any(p.requires_grad for p in parameters)
        assert not trained & {id(p) for p in parameters}
        assert not any("teacher" in name for name, _ in pl_module.named_modules())
        assert list(pl_module.state_dict()) == list(net().state_dict())
        self.seen.append({name: value.clone() for name, value in teacher.state_dict().items()})


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_teacher_is_the_float_model(dtype):
    before, look = Before(), Teacher()
    guidance = Guidance(dtype=dtype)
    noise = QuantNoise(PQS, rate=0.5)
    fit(net(dropout=0.2), [before, look, noise, quantize(TWO, guidance=guidance), checkpoint(every_n_train_steps=4)])
    assert len(look.seen) == 16
    for seen in look.seen:
        assert all(value.dtype == (torch.bfloat16 if dtype else torch.float32) for value in seen.values())
        assert all(torch.equal(seen[name], before.state[name].to(seen[name].dtype)) for name in before.state)
    for path in Path("ckpt").iterdir():
        assert list(torch.load(path)["state_dict"]) == list(net().state_dict())
    assert equal(torch.load("float.ckpt")["state_dict"], before.state)


def test_no_teacher_for_a_share_of_nothing():
    models = [net(), net()]
    for model, guidance in zip(models, (None, Guidance(alpha=0.0)), strict=True):
        fit(model, [quantize(TWO, guidance=guidance)])
    assert equal(*models)


@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_guidance_against_a_loop_by_hand(alpha):
    before, model = Before(), net(lr=0.01)
    guidance = {"guidance": Guidance(alpha=alpha, temperature=3.0), "reassign": False}
    settings = {**guidance, "schedule": lambda _: 1.0}
    fit(model, [before, quantize(optimizer=lambda p: torch.optim.SGD(p, 0.1), **settings)])

    teacher, student = net(), net()
    teacher.load_state_dict(before.state)
    student.load_state_dict(before.state)
    packed = {name: PQS[name].encode(getattr(student, name).weight) for name in TWO}
    codes = {name: weight.indices().flatten().long() for name, weight in packed.items()}
    for name in TWO:
        getattr(student, name).weight.data.copy_(packed[name].decode())
    for x, y in rows():
        logits = student(x)
        part = soft_targets(logits, teacher(x).detach(), 3.0)
        loss = (1 - alpha) * F.cross_entropy(logits, y) + alpha * part
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name in TWO:
                gradient, of = getattr(student, name).weight.grad, codes[name]
                blocks = gradient.view(-1, 8)
                for code in of.unique():
                    blocks[of == code] = blocks[of == code].mean(dim=0)
            for parameter in student.parameters():
                parameter -= 0.1 * parameter.grad
    for name, weight in packed_weights(model):
        assert torch.equal(weight.indices().flatten(), codes[name.split(".")[0]].int())
        assert weight.decode() == pytest.approx(student.get_parameter(name).detach(), abs=1e-3)
    assert model.fc.bias.detach() == pytest.approx(student.fc.bias.detach(), abs=1e-5)


class TwoCalls(Net):
    """Calls two children, and not itself."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(F.relu(self.fc(batch[0]))), batch[1])


class NoCalls(Net):
    """Uses weights, and calls nothing."""

    def training_step(self, batch, batch_idx):
        hidden = F.relu(F.linear(batch[0], self.fc.weight, self.fc.bias))
        return F.cross_entropy(F.linear(hidden, self.head.weight), batch[1])


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (TwoCalls, r"calls fc, head, so .*Guidance\(target=...\)"),
        (NoCalls, r"does not call any module.*Guidance\(target=...\)"),
    ],
)
def test_a_teacher_that_cannot_guide_is_refused_in_the_first_step(cls, message):
    watch, model = Watch(), net(cls=cls)
    with pytest.raises(ValueError, match=message):
        fit(model, [watch, quantize(TWO)])
    assert not watch.batches
    assert "training_step" not in model.__dict__
    for guidance in (None, Guidance(target="head")) if cls is TwoCalls else (None,):
        fit(net(cls=cls), [quantize(TWO, guidance=guidance)], enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"no module 'tail' to distill.*fc, dropout, head"):
        fit(net(), [quantize(TWO, guidance=Guidance(target="tail"))])


class Stops(Callback):
    """Raises in the middle of a stage, or of its training step."""

    def __init__(self, error, stage, within=False):
        self.error, self.stage, self.within = error, stage, within

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.progress_bar_metrics.get("quantize/stage") == self.stage and batch_idx == 5 and not self.within:
            raise self.error

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.n = getattr(self, "n", 0) + 1
        if self.within and self.n == 16 + 8 * (self.stage - 1) + 6:
            raise self.error


@pytest.mark.parametrize("reassign", [True, False])
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize(("error", "stage"), [(RuntimeError, 1), (RuntimeError, 2), (KeyboardInterrupt, 2)])
def test_an_error_within_a_stage_leaves_a_plain_model(error, stage, within, reassign):
    model, early = net(dropout=0.2), callbacks.EarlyStopping("val_loss")
    noise, keep = QuantNoise(PQS, rate=0.5), checkpoint(every_n_train_steps=4)
    staged = quantize(TWO, reassign=reassign)
    listed = [noise, early, staged, Stops(error(), stage, within), keep]
    made = trainer(listed)
    with pytest.raises((error, SystemExit)):
        made.fit(model)
    assert [type(module) for module in model.children()] == [nn.Linear, nn.Dropout, nn.Linear]
    assert model.training_step.__func__ is type(model).training_step
    assert "training_step" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.dropout.p == 0.2
    assert made.callbacks[:5] == listed
    assert (made.max_epochs, made.max_steps) == (2, -1)
    assert list(model.state_dict()) == list(net().state_dict())
    assert "on_train_end" not in staged.__dict__
    assert n_blocks(model.fc.weight.detach()) <= 16
    assert (n_blocks(model.head.weight.detach()) <= 4) == (stage == 2)
    step = max(int(path.stem.split("=")[-1]) for path in Path("ckpt").iterdir())
    path = next(Path("ckpt").glob(f"*step={step}.ckpt"))
    resumed = net(dropout=0.2, seed=9)
    early, keep = callbacks.EarlyStopping("val_loss"), checkpoint(every_n_train_steps=4)
    fit(resumed, [QuantNoise(PQS, rate=0.5), early, quantize(TWO, reassign=reassign), keep], ckpt_path=path)
    assert type(resumed.head).__name__ == "PackedLinear"


class SecondOrder(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=4)


def test_lbfgs():
    watch = Watch()
    with pytest.raises(ValueError, match=r"LBFGS evaluates.*Finetune\(reassign=False\)"):
        fit(net(cls=SecondOrder), [watch, quantize(TWO)])
    assert not watch.hooks
    model = net(cls=SecondOrder)
    fit(model, [watch, quantize(TWO, reassign=False)])
    assert all(n_blocks(watch.state[name]) <= k for name, k in (("fc.weight", 16), ("head.weight", 4)))
    assert equal_decoded(model, watch.state)
    with pytest.raises(ValueError, match="LBFGS"):
        fit(net(), [quantize(TWO, optimizer=lambda p: torch.optim.LBFGS(list(p)))])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "64-true"])
@pytest.mark.parametrize("reassign", [True, False])
@pytest.mark.filterwarnings("ignore:You passed `Trainer\\(accelerator='cpu', precision='16-mixed'\\)`:UserWarning")
def test_precisions(precision, reassign):
    before, watch, model = Before(), Watch(), net()
    starts = {}
    callback = quantize(TWO, reassign=reassign)
    watch.on_train_start = lambda trainer, pl_module: starts.setdefault(
        callback._work.current, {name: value.clone() for name, value in pl_module.state_dict().items()}
    )
    fit(model, [before, watch, callback], precision=precision)
    weight = before.state["fc.weight"]
    packed = PQS["fc"].encode(weight.float())
    assert weight.dtype == starts[1]["fc.weight"].dtype
    codewords = packed.codebook.to(weight.dtype).unique(dim=0)
    assert torch.isin(starts[1]["fc.weight"], codewords).all()
    assert (starts[1]["fc.weight"].float() - packed.decode().float()).abs().max() < 1e-2
    for name, found in packed_weights(model):
        assert found.codebook.isfinite().all(), name
        assert n_blocks(watch.state[name]) <= PQS[name.split(".")[0]].n_centroids
        assert found.decode().float() == pytest.approx(watch.state[name].float(), rel=1e-2, abs=1e-3)


class Normed(Net):
    """With BatchNorm."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.fc(x))))


def test_batch_norm_statistics_are_those_of_the_packed_model():
    model = net(cls=Normed)
    fit(model, [quantize(TWO)])
    hidden = [model.fc(x) for x, _ in rows()]
    mean = torch.stack([h.mean(dim=0) for h in hidden]).mean(dim=0)
    variance = torch.stack([h.var(dim=0) for h in hidden]).mean(dim=0)
    assert model.norm.running_mean == pytest.approx(mean.detach(), abs=1e-6)
    assert model.norm.running_var == pytest.approx(variance.detach(), abs=1e-5)
    assert model.norm.momentum == 0.1


class Rate(float):
    """What `torch.load` takes for unsafe."""


def test_the_best_may_hold_hyperparameters_of_any_kind():
    model = net(lr=Rate(0.05))
    fit(model, [quantize(start="best"), checkpoint(monitor="val_loss")])
    assert type(model.hparams.lr) is Rate
    assert type(model.fc).__name__ == "PackedLinear"


def test_a_stop_within_a_stage_ends_that_stage():
    watch, stop = Watch(), Callback()

    def end(trainer, *_):
        trainer.should_stop = trainer.should_stop or (watch.stages[-1], len(watch.stages)) == (1, 20)

    stop.on_train_batch_end = end
    fit(net(), [watch, stop, quantize(TWO)])
    assert [watch.stages.count(stage) for stage in (1, 2)] == [4, 8]


@pytest.mark.parametrize("rate, same", [(1.0, True), (0.5, False)])
def test_noise_at_rate_one_leaves_no_teacher(rate, same):
    models = []
    for finetune in (Finetune(steps=4), Finetune(steps=4, guidance=None)):
        models.append(net())
        fit(models[-1], [QuantNoise(PQS, rate=rate), Quantize(stages="joint", finetune=finetune, path=None)])
    assert equal(*models) is same
