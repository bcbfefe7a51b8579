"""Fits with a teacher, against loops and recursions written by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import PQS, ROOTS, Lazy, Manual, Net, checkpoint, equal, fit, net, rows, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_qnoise import Finetune, Guidance, Quantize, QuantNoise, quantize
from lightning_qnoise.callbacks.distill import Distill
from lightning_qnoise.distill import soft_targets

RESUMES = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:Checkpoint directory:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
)
JOINT = {"policy": PQS, "stages": "joint", "path": None}


class Same(Net):
    """Eight batches with the same rows: Lightning does not restore the place in a plain DataLoader."""

    def train_dataloader(self):
        x, y = next(iter(super().train_dataloader()))
        return DataLoader(TensorDataset(x.repeat(8, 1), y.repeat(8)), 8)


class Watch(Callback):
    """Keeps what is logged, and the weights, after every batch."""

    def __init__(self):
        self.losses, self.weights, self.wrapped = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.losses.append(trainer.callback_metrics.get("distill/loss"))
        self.weights.append(pl_module.fc.weight.detach().double().numpy().copy())
        self.wrapped.append("training_step" in vars(pl_module))


def big(seed=5):
    """A teacher of another architecture."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 4))


def by_hand(model, teacher, alpha=0.5, temperature=1.0, epochs=2, every=1, ema=None):
    """A loop with nothing of the package but the KL divergence, which has tests of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=model.lr)
    averages, losses, n_steps = {}, [], 0
    if ema is not None:
        averages = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(epochs):
        for index, (x, y) in enumerate(rows(), 1):
            with torch.no_grad():
                answer = torch.func.functional_call(model, averages, (x,)) if ema is not None else teacher(x)
            logits = model(x)
            part = soft_targets(logits, answer, temperature)
            losses.append(part.item())
            loss = (1 - alpha) * F.cross_entropy(logits, y) + alpha * part
            (loss / every).backward()
            if index % every == 0 or index == 8:
                optimizer.step()
                optimizer.zero_grad()
                n_steps += 1
                d = min(ema, n_steps / (n_steps + 1)) if ema is not None else 0
                for name, average in averages.items():
                    average.lerp_(model.get_parameter(name).detach(), 1 - d)
    return losses


def close(a, b, **tolerance):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), **tolerance)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("every", [1, 3])
def test_a_bigger_teacher_as_by_hand(root, every):
    teacher, watch = big(), Watch()
    fitted, looped = net(root), net(root)
    fit(fitted, [Distill(teacher, Guidance(0.7, 2.0)), watch], root, accumulate_grad_batches=every)
    losses = by_hand(looped, teacher.eval(), 0.7, 2.0, every=every)
    assert equal(fitted, looped)
    assert [float(loss) for loss in watch.losses] == losses
    assert not equal(fitted, net(root))
    assert "training_step" not in vars(fitted)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(("every", "decay"), [(1, 0.9), (3, 0.6), (1, 0.0)])
def test_the_moving_average_as_by_hand(root, every, decay):
    fitted, looped, watch = net(root), net(root), Watch()
    callback = Distill("ema", Guidance(0.4), decay=decay)
    fit(fitted, [callback, watch], root, accumulate_grad_batches=every)
    by_hand(looped, None, 0.4, every=every, ema=decay)
    close(fitted, looped, rtol=1e-5, atol=1e-6)
    average = net().fc.weight.detach().double().numpy()
    stepped = [w for i, w in enumerate(watch.weights, 1) if (i - 1) % 8 + 1 in range(every, 9, every) or i % 8 == 0]
    for t, weight in enumerate(stepped, 1):
        d = min(decay, t / (t + 1))
        average = d * average + (1 - d) * weight
    state = callback.state_dict()
    assert state["n_updates"] == len(stepped)
    np.testing.assert_allclose(state["means"]["fc.weight"].numpy(), average, rtol=1e-5, atol=1e-6)


def test_a_step_that_did_not_happen_does_not_move_the_average():
    """As the gradient scaler skips steps with overflown gradients; global_step counts them nevertheless."""

    class Skips(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2:
                optimizer_closure()
            else:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    callback = Distill("ema")
    fit(net(cls=Skips), [callback])
    assert callback.state_dict()["n_updates"] == 8


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}])
@RESUMES
def test_a_resumed_average_goes_on_bit_equally(options):
    def callbacks():
        return [Distill("ema", Guidance(0.5, **options), decay=0.8), checkpoint(every_n_train_steps=4)]

    whole = net(cls=Same)
    first = callbacks()
    fit(whole, first, max_epochs=3)
    for name in ("epoch=0-step=4", "epoch=0-step=8", "epoch=1-step=12"):
        resumed, second = net(cls=Same, seed=9), callbacks()
        fit(resumed, second, max_epochs=3, ckpt_path=f"ckpt/{name}.ckpt")
        assert equal(resumed, whole), name
        a, b = first[0].state_dict(), second[0].state_dict()
        assert a["n_updates"] == b["n_updates"] == 24
        assert equal(a["means"], b["means"])
    state = torch.load("ckpt/epoch=0-step=8.ckpt")
    state["callbacks"]["Distill"] = {}
    torch.save(state, "without.ckpt")
    resumed = net(cls=Same)
    fit(resumed, callbacks(), max_epochs=3, ckpt_path="without.ckpt")
    assert not equal(resumed, whole)


@RESUMES
def test_the_state_survives_the_end_an_exception_and_a_learning_rate_finder():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                raise RuntimeError("stop")

        def on_exception(self, trainer, *args):
            trainer.save_checkpoint("raised.ckpt")

    whole, after = net(cls=Same), net(cls=Same)
    fit(whole, [Distill("ema", decay=0.8)], max_epochs=2)
    fit(after, [Distill("ema", decay=0.8)], max_epochs=1).save_checkpoint("after.ckpt")
    with pytest.raises(RuntimeError, match="stop"):
        fit(net(cls=Same), [Distill("ema", decay=0.8), Stop()], max_epochs=2)
    for name in ("after", "raised"):
        resumed = net(cls=Same, seed=9)
        fit(resumed, [Distill("ema", decay=0.8)], max_epochs=2, ckpt_path=f"{name}.ckpt")
        assert equal(resumed, whole)
    callback = Distill("ema", decay=0.8)
    fit(net(), [callback, LearningRateFinder(num_training_steps=3)], max_epochs=2, ckpt_path="after.ckpt")
    assert callback.state_dict()["n_updates"] == 8 + 16  # Lightning begins at epoch 0 again after a finder


def test_a_state_that_is_put_back_within_the_fit_counts():
    class PutBack(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            state = trainer.callbacks[0].state_dict()
            trainer.callbacks[0].load_state_dict({**state, "n_updates": 100 * trainer.current_epoch})

    callback = Distill("ema", decay=0.8)
    fit(net(), [callback, PutBack()], max_epochs=2)
    assert callback.state_dict()["n_updates"] == 108


def test_a_learning_rate_finder_within_the_fit_keeps_the_average():
    class Again(LearningRateFinder):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    callback = Distill("ema", decay=0.8)
    fit(net(), [callback, Again(num_training_steps=3)], max_epochs=2)
    assert callback.state_dict()["n_updates"] == 16


@pytest.mark.parametrize("root", ROOTS)
def test_a_checkpoint_teaches_as_the_module_does(root):
    fit(net(root, seed=3), [checkpoint(root, filename="teacher")], root, max_epochs=1)
    teacher = net(root)
    teacher.load_state_dict(torch.load("ckpt/teacher.ckpt")["state_dict"])
    by_path, by_module = net(root), net(root)
    fit(by_path, [Distill(Path("ckpt/teacher.ckpt"))], root)
    fit(by_module, [Distill(teacher)], root)
    assert equal(by_path, by_module)
    assert not equal(by_path, fitted_plain(root))


def fitted_plain(root=ROOTS[0], **options):
    model = net(root)
    fit(model, root=root, **options)
    return model


@pytest.mark.parametrize("options", [{}, {"save_weights_only": True, "enable_version_counter": False}])
def test_the_best_weights_teach_as_soon_as_there_are_some(options):
    """Validation twice an epoch; the best is the first of all where the metric only grows."""

    class Growing(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.global_step if self.grows else -self.global_step))

    for grows, best_of in ((True, {4: 4, 8: 4, 12: 4}), (False, {4: 4, 8: 8, 12: 12})):
        fitted, looped, watch = net(cls=Growing), net(), Watch()
        fitted.grows = grows
        saver = checkpoint(monitor="val_loss", save_top_k=1, dirpath=f"best{grows}", filename="best", **options)
        fit(fitted, [Distill("best", Guidance(0.4)), watch, saver], val_check_interval=4)
        assert watch.losses[:4] == [None] * 4
        optimizer = torch.optim.AdamW(looped.parameters(), lr=looped.lr)
        kept, teacher = {}, None
        for step, (x, y) in enumerate([*rows(), *rows()]):
            if step in best_of:
                kept[step] = {name: value.clone() for name, value in looped.state_dict().items()}
                teacher = net().eval()
                teacher.load_state_dict(kept[best_of[step]])
            logits = looped(x)
            loss = F.cross_entropy(logits, y)
            if teacher is not None:
                loss = 0.6 * loss + 0.4 * soft_targets(logits, teacher(x).detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        close(fitted, looped, rtol=1e-5, atol=1e-6)


@RESUMES
def test_best_resumes_bit_equally():
    def callbacks():
        return [Distill("best"), checkpoint(monitor="val_loss")]

    whole, resumed = net(), net(seed=9)
    fit(whole, callbacks(), max_epochs=3)
    fit(resumed, callbacks(), max_epochs=3, ckpt_path="ckpt/epoch=0-step=8.ckpt")
    assert equal(resumed, whole)


def test_best_in_a_trial_run_and_without_validation_is_no_guidance():
    model = net()
    fit(model, [Distill("best"), checkpoint(monitor="val_loss")], fast_dev_run=True)
    plain = net()
    fit(plain, fast_dev_run=True)
    assert equal(model, plain)


@pytest.mark.parametrize("teacher", ["ema", "best", "module"])
def test_the_teacher_is_nowhere_in_the_module_or_its_checkpoint(teacher):
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["keys"] = list(pl_module.state_dict())
            seen["n"] = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
            seen["modules"] = len(list(pl_module.modules()))

    module = big()
    callback = Distill(module if teacher == "module" else teacher)
    fit(net(), [callback, Look(), checkpoint(monitor="val_loss")])
    state = torch.load("ckpt/epoch=1-step=16.ckpt")
    assert list(state["state_dict"]) == seen["keys"] == list(net().state_dict())
    assert seen["n"] == 4
    assert seen["modules"] == len(list(net().modules()))
    assert ("Distill" in state["callbacks"]) == (teacher == "ema")
    assert not module.training or teacher != "module"


def test_half_precision_leaves_the_users_module_alone():
    teacher = big()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = net()
    fit(model, [Distill(teacher, Guidance(dtype="bfloat16"))])
    assert equal(teacher, before)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    looped, half = net(), big().eval().bfloat16()
    by_hand(looped, lambda x: half(x.bfloat16()))
    assert equal(model, looped)


def test_features_of_another_architecture():
    teacher, watch = big(), Watch()
    sums = lambda s, t: F.mse_loss(s.sum(1), t.sum(1))  # noqa: E731
    guidance = Guidance(alpha=1.0, features={"fc": ("0", sums), "head": "3"}, feature_weight=0.5)
    fit(net(), [Distill(teacher, guidance), watch])
    student, (x, _) = net(), next(iter(rows()))
    with torch.no_grad():
        expected = soft_targets(student(x), teacher(x)) + 0.5 * (
            sums(student.fc(x), teacher[0](x)) + F.mse_loss(student(x), teacher(x))
        )
    assert float(watch.losses[0]) == pytest.approx(expected.item(), 1e-6)


class Mapping(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self(batch[0])["logits"], batch[1])}

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Tuple(Mapping):
    def forward(self, x):
        return super().forward(x)["logits"], None

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])


class Checkpointed(Net):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Compiled(Net):
    def __init__(self):
        super().__init__()
        self.fc = torch.compile(self.fc, backend="eager")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("teacher", ["ema", "module"])
@pytest.mark.parametrize(
    ("cls", "options", "guidance"),
    [
        (Net, {"precision": "bf16-mixed"}, {}),
        (Net, {"precision": "bf16-true"}, {}),
        (Net, {"precision": "64-true"}, {}),
        (Net, {"gradient_clip_val": 0.1}, {}),
        (Net, {"max_steps": 5}, {}),
        (Net, {"overfit_batches": 2}, {}),
        (Net, {"num_sanity_val_steps": 1, "val_check_interval": 3}, {}),
        (Lazy, {}, {"target": ""}),
        (Mapping, {"accumulate_grad_batches": 2}, {}),
        (Tuple, {}, {"loss": lambda s, t: soft_targets(s[0], t if torch.is_tensor(t) else t[0])}),
        (Checkpointed, {}, {}),
        (Compiled, {}, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning", "ignore:You are overriding:UserWarning")
def test_kinds_of_fits(cls, options, guidance, teacher):
    model, watch = net(cls=cls), Watch()
    if cls is Compiled:
        watch.on_train_batch_end = lambda trainer, pl_module, *args: watch.wrapped.append(
            "training_step" in vars(pl_module) and "distill/loss" in trainer.callback_metrics
        )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = fit(model, [Distill(big() if teacher == "module" else "ema", Guidance(**guidance)), watch], **options)
    assert all(watch.wrapped)
    assert made.callback_metrics["distill/loss"].isfinite()
    assert "training_step" not in vars(model)
    assert not before or not equal(model, before)


def test_a_packed_teacher():
    packed, dense = quantize(net(seed=3), PQS), net(seed=3)
    first, second = net(), net()
    fit(first, [Distill(packed)])
    quantize(dense, PQS)
    with torch.no_grad():
        decoded = {name: weight.clone() for name, weight in (("fc", dense.fc.weight), ("head", dense.head.weight))}
    plain = net(seed=3)
    plain.fc.weight.data, plain.head.weight.data = decoded["fc"], decoded["head"]
    fit(second, [Distill(plain)])
    close(first, second, rtol=1e-4, atol=1e-5)


def test_switched_off_and_alpha_zero_are_the_plain_fit():
    plain, off, zero = fitted_plain(), net(), net()
    fit(off, [Distill("ema", enabled=False)])
    fit(zero, [Distill("ema", Guidance(alpha=0.0))])
    assert equal(off, plain)
    assert equal(zero, plain)


def test_the_same_callback_in_two_fits_starts_anew():
    callback, models = Distill("ema", decay=0.9), [net(), net()]
    for model in models:
        fit(model, [callback])
        assert callback.state_dict()["n_updates"] == 16
    assert equal(*models)


def test_detached_after_an_exception():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("at 3")
            return super().training_step(batch, batch_idx)

    model = net(cls=Fails)
    with pytest.raises(RuntimeError, match="at 3"):
        fit(model, [Distill("ema")])
    assert "training_step" not in vars(model)
    assert not model._forward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_validation_and_test_see_the_students_own_metrics():
    model, callback = net(), Distill(big())
    fit(model, [callback])
    made = trainer([callback])
    assert made.validate(model, verbose=False) == trainer().validate(model, verbose=False)
    assert made.test(model, verbose=False) == trainer().test(model, verbose=False)


@pytest.mark.parametrize("order", [1, -1])
def test_the_own_teacher_of_quantize_takes_over_in_its_stages(order):
    """As a fit without Distill that starts its stages from the weights that Distill has trained."""
    watch = Watch()
    model, first = net(), net()
    quantizes = Quantize(**JOINT, finetune=Finetune(epochs=1))
    fit(model, [*[Distill(big()), quantizes][::order], watch])
    fit(first, [Distill(big())])
    second = net()
    second.load_state_dict(first.state_dict())
    fit(second, [Quantize(**JOINT, finetune=Finetune(epochs=1))], max_epochs=0)
    assert equal(model, second)
    assert len(watch.wrapped) == 24
    assert "training_step" not in vars(model)


@pytest.mark.parametrize("order", [1, -1])
def test_the_teacher_stays_in_stages_without_one_of_their_own(order):
    losses = []
    for teacher in (big(), big(6)):
        watch, finetune = Watch(), Finetune(epochs=1, guidance=None)
        model = net()
        fit(model, [*[Distill(teacher), Quantize(**JOINT, finetune=finetune)][::order], watch], max_epochs=1)
        assert type(model.fc).__name__ == "PackedLinear"
        assert "training_step" not in vars(model)
        losses.append([float(loss) for loss in watch.losses])
    assert len(losses[0]) == len({*losses[0]}) == 16
    assert losses[0][8:] != losses[1][8:]


@pytest.mark.parametrize("teacher", ["ema", "best"])
def test_with_noise_stages_and_checkpoints_together(teacher):
    model = net()
    callbacks = [QuantNoise(PQS, rate=0.3), Distill(teacher), Quantize(**JOINT), checkpoint(monitor="val_loss")]
    made = fit(model, callbacks)
    assert type(model.fc).__name__ == "PackedLinear"
    assert "quantized/val_loss" in made.callback_metrics
    assert "training_step" not in vars(model)


@RESUMES
@pytest.mark.parametrize("guidance", [None, Guidance()])
def test_resumes_within_a_stage_of_quantize(guidance):
    def callbacks():
        finetune = Finetune(epochs=2, guidance=guidance)
        return [Distill("ema", decay=0.8), Quantize(**JOINT, finetune=finetune), checkpoint()]

    whole, resumed = net(), net(seed=9)
    fit(whole, callbacks(), max_epochs=1)
    fit(resumed, callbacks(), max_epochs=1, ckpt_path="ckpt/epoch=1-step=16.ckpt")
    assert equal(resumed, whole)


@pytest.mark.parametrize("root", ROOTS)
def test_two_are_refused(root):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer([Distill("ema"), Distill(big())], root)
    trainer([Distill("ema"), Distill(big(), enabled=False)], root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "emma"}, "there is no file 'emma'"),
        ({"teacher": Path("x/y.ckpt")}, r"there is no file 'x.y.ckpt'"),
        ({"teacher": "ema", "decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Distill(**options)


class Nothing(Callback):
    def on_train_batch_start(self, *args):
        raise AssertionError("a batch was trained on")


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"target": "heads"}, "no module 'heads' to distill; its children are fc, dropout, head"),
        ({"features": {"fd": "0"}}, "the student has no module 'fd' to distill"),
        ({"features": {"fc": "body"}}, "the teacher has no module 'body' to distill; its children are 0, 1, 2, 3"),
    ],
)
def test_names_that_do_not_exist_are_refused_before_the_first_batch(guidance, message, root):
    model = net(root)
    with pytest.raises(ValueError, match=message):
        fit(model, [Nothing(), Distill(big(), Guidance(**guidance))], root)
    assert "training_step" not in vars(model)


def test_refusals_in_setup():
    with pytest.raises(ValueError, match="cannot guide manual optimization"):
        fit(net(cls=Manual), [Distill("ema")])
    for saver in ([], [checkpoint()], [checkpoint(monitor="val_loss", save_top_k=0)]):
        with pytest.raises(ValueError, match=r"Distill\('best'\) needs a ModelCheckpoint with a monitor"):
            fit(net(), [Distill("best"), *saver])
    with pytest.raises(ValueError, match="already packed, so Distill cannot train it"):
        fit(quantize(net(), PQS), [Distill("ema")])
    made = trainer([Distill("ema")])
    made.strategy.__class__ = type("MyFSDP", (type("FSDPStrategy", (type(made.strategy),), {}),), {})
    with pytest.raises(ValueError, match="MyFSDP shards them"):
        made.fit(net())


def test_refusals_before_the_first_batch():
    model = net()
    for teacher in (model, nn.Sequential(model.fc, nn.Linear(32, 4))):
        with pytest.raises(ValueError, match="the teacher shares parameters with the student"):
            fit(model, [Nothing(), Distill(teacher)])
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.save({"state_dict": {"fc.weight": torch.zeros(3)}}, "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt does not fit Net as it is; .* pass the teacher as a module"):
        fit(model, [Distill("other.ckpt"), Nothing()])
    torch.save([1], "list.ckpt")
    with pytest.raises(ValueError, match=r"list.ckpt is no Lightning checkpoint"):
        fit(model, [Distill("list.ckpt"), Nothing()])


def test_a_student_with_few_labels_is_better_with_a_teacher():
    """The teacher has seen 2048 labels, the student 16; both see the same 512 rows."""
    torch.manual_seed(0)
    rule = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
    rule[2].weight.data *= 6
    x = torch.randn(4096, 16)
    with torch.no_grad():
        y = rule(x).argmax(dim=1)
    teacher = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for step in range(400):
        part = slice(256 * (step % 8), 256 * (step % 8) + 256)
        optimizer.zero_grad()
        F.cross_entropy(teacher(x[part]), y[part]).backward()
        optimizer.step()

    class Few(Net):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=-1)

    labels = y[:512].clone()
    labels[labels.new_tensor([index % 32 != 0 for index in range(512)]).bool()] = -1
    loader = DataLoader(TensorDataset(x[:512], labels), 128)
    accuracies = []
    for callbacks in ([], [Distill(teacher, Guidance(0.9, 2.0))]):
        model = net(cls=Few, lr=0.01)
        made = trainer(callbacks, max_epochs=25, limit_val_batches=0)
        made.fit(model, loader)
        with torch.no_grad():
            accuracies.append((model.eval()(x[2048:]).argmax(dim=1) == y[2048:]).float().mean().item())
    assert accuracies[1] > accuracies[0] + 0.1, accuracies


class InOrder(Net):
    """Rows dealt out in turn, not shuffled."""

    def train_dataloader(self):
        dataset = super().train_dataloader().dataset
        return DataLoader(dataset, 8, sampler=DistributedSampler(dataset, shuffle=False))


class Spy(Callback):
    """Dumps gradients, losses and the callback's state of this rank."""

    def __init__(self, kind):
        self.kind, self.gradients, self.losses = kind, [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.extend(p.grad.clone() for p in pl_module.parameters())

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.losses.append(float(trainer.callback_metrics["distill/loss"]))

    def on_fit_end(self, trainer, pl_module):
        seen = {"gradients": self.gradients, "losses": self.losses, "model": dict(pl_module.state_dict())}
        torch.save({**seen, "state": trainer.callbacks[0].state_dict()}, f"{self.kind}{trainer.global_rank}.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd with threads for a GPU cannot be forked")
def test_two_processes_stay_in_sync():
    for kind in ("module", "ema"):
        spied = [Distill(big() if kind == "module" else kind), Spy(kind)]
        options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False, "limit_val_batches": 0}
        fit(net(cls=InOrder), spied, **options)
        zero, one = (torch.load(f"{kind}{rank}.pt") for rank in (0, 1))
        assert equal(zero["model"], one["model"])
        assert all(torch.equal(a, b) for a, b in zip(zero["gradients"], one["gradients"], strict=True))
        assert zero["losses"] != one["losses"]  # each rank guides on its own rows
        assert kind == "module" or equal(zero["state"]["means"], one["state"]["means"])

    looped, teacher = net(), big().eval()
    optimizer, dataset = torch.optim.AdamW(looped.parameters(), lr=looped.lr), rows().dataset.tensors
    for start in [*range(0, 64, 16)] * 2:  # what the sampler deals out in a step are 16 rows on end
        x, y = (tensor[start : start + 16] for tensor in dataset)
        logits = looped(x)
        loss = 0.5 * F.cross_entropy(logits, y) + 0.5 * soft_targets(logits, teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = torch.load("module0.pt")["model"]
    torch.testing.assert_close(state, dict(looped.state_dict()), rtol=1e-4, atol=1e-5)
