"""QuantNoise in a fit, against the same fit without it."""

import copy
import pickle

import pytest
import torch
from fits import PQS, ROOTS, Lazy, Manual, Net, checkpoint, equal, fit, net, trainer
from pytorch_lightning import Callback
from torch import nn

from lightning_qnoise import PQ, Int, LinearRate, QuantNoise, StepRate
from lightning_qnoise.attach import NoisyLayer

each_root = pytest.mark.parametrize("root", ROOTS)


class Watch(Callback):
    """Collects what a function of the module gives in one hook."""

    def __init__(self, hook, look):
        self.seen = []
        setattr(self, hook, lambda trainer, pl_module, *args: self.seen.append(look(trainer, pl_module)))


def is_noisy(model):
    return any(isinstance(m, NoisyLayer) for m in model.modules())


def is_read_noisy(model):
    """Whether a training forward of the layer differs from that with its Parameter."""
    x = torch.ones(1, 16)
    return not torch.equal(model.fc(x), nn.functional.linear(x, model.fc._parameters["weight"], model.fc.bias))


@each_root
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rate_zero_trains_bit_identically(root, dropout):
    with_it, without = net(root, dropout=dropout), net(root, dropout=dropout)
    fit(with_it, [QuantNoise(PQS, rate=0.0)], root)
    fit(without, [], root)
    assert equal(with_it, without)


@pytest.mark.parametrize("policy", ["pq", "int8"])
def test_noise_changes_the_training_and_spares_the_global_random_state(policy):
    states = []
    models = [net(dropout=0.5), net(dropout=0.5)]
    for model, callbacks in zip(models, ([QuantNoise(policy, rate=0.5)], []), strict=True):
        fit(model, callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert not equal(*models)


@each_root
def test_noise_is_on_in_training_batches_only(root):
    hooks = [
        "on_sanity_check_start", "on_validation_batch_start", "on_before_optimizer_step",
        "on_train_batch_end", "on_train_epoch_end", "on_train_batch_start",
    ]  # fmt: skip
    watches = [Watch(hook, lambda trainer, model: is_read_noisy(model)) for hook in hooks]
    model = net(root)
    fit(model, [QuantNoise(PQS, rate=1.0), *watches], root, num_sanity_val_steps=1)
    *off, on = [set(watch.seen) for watch in watches]
    assert off[:2] == [{False}, {False}]
    assert off[2] == {True}  # the training forward runs inside the optimizer's closure
    assert off[3:] == [{False}, {False}]
    assert on == {True}
    assert not is_noisy(model)
    assert type(model) is type(net(root))


def test_validation_and_sanity_check_see_the_plain_model():
    weights = Watch("on_validation_start", lambda trainer, model: copy.deepcopy(model.state_dict()))
    seen = Watch("on_validation_epoch_end", lambda trainer, model: trainer._results.metrics(False)["callback"])
    fit(net(), [QuantNoise(PQS, rate=0.7), weights, seen], num_sanity_val_steps=1)
    assert len(seen.seen) == 3
    for index, (state, metrics) in enumerate(zip(weights.seen, seen.seen, strict=True)):
        model = net()
        model.load_state_dict(state)
        plain = trainer(limit_val_batches=1 if index == 0 else 1.0).validate(model, verbose=False)
        assert plain[0]["val_loss"] == float(metrics["val_loss"])


@each_root
def test_checkpoints_have_the_usual_keys_and_load_in_the_plain_class(root):
    callbacks = [QuantNoise(PQS, rate=0.3), checkpoint(root, every_n_train_steps=3)]
    fit(net(root), callbacks, root)
    fit(net(root), [checkpoint(root, dirpath="plain", every_n_train_steps=3)], root)
    for path in ("epoch=0-step=3.ckpt", "epoch=1-step=15.ckpt"):
        ours = torch.load(f"ckpt/{path}", weights_only=True)
        plain = torch.load(f"plain/{path}", weights_only=True)
        assert list(ours["state_dict"]) == list(plain["state_dict"])
        assert ours["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]
        assert set(ours) == set(plain)
        loaded = type(net(root)).load_from_checkpoint(f"ckpt/{path}")
        assert equal(loaded, ours["state_dict"])


def test_a_checkpoint_holds_codebooks_of_pq_and_nothing_of_int():
    noise = {"pq": QuantNoise({"fc": PQ(8, 16), "head": Int(8)}), "int8": QuantNoise("int8"), "zero": None}
    noise["zero"] = QuantNoise(PQS, kind="zero")
    targets = {}
    for name, callback in noise.items():
        fit(net(), [callback, checkpoint(dirpath=name, save_last=True)])
        targets[name] = torch.load(f"{name}/last.ckpt")["callbacks"]["QuantNoise"]["targets"]
    assert [list(t) for t in targets.values()] == [["fc.weight"], [], []]
    assert targets["pq"]["fc.weight"].keys() == {"codes", "codebook"}


def rates(callback, **kwargs):
    watch = Watch("on_train_batch_end", lambda trainer, model: float(trainer.callback_metrics["quant_noise/rate"]))
    fit(net(), [callback, watch], **kwargs)
    return watch.seen


def test_the_rate_follows_its_schedule_and_is_logged():
    assert rates(QuantNoise(PQS, rate=0.3)) == [pytest.approx(0.3)] * 16
    assert rates(QuantNoise(PQS, rate=LinearRate(0.0, 0.8))) == pytest.approx([0.05 * i for i in range(16)])
    assert rates(QuantNoise(PQS, rate=lambda progress: progress**2)) == pytest.approx(
        [(i / 16) ** 2 for i in range(16)]
    )
    assert rates(QuantNoise(PQS, rate=LinearRate(0.0, 1.0)), max_steps=5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    steps = rates(QuantNoise(PQS, rate=StepRate([0.0, 0.5], [0.5])), max_epochs=1)
    assert steps == pytest.approx([0.0] * 4 + [0.5] * 4)


def test_the_nearer_of_epochs_and_steps_is_the_end():
    got = rates(QuantNoise(PQS, rate=LinearRate(0.0, 1.0)), max_epochs=100, max_steps=4)
    assert got == pytest.approx([0.0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize(("refresh", "expected"), [("epoch", 3), (4, 6), (24, 1)])
def test_codebooks_are_clustered_anew_as_asked(refresh, expected):
    noise = QuantNoise(PQS, rate=0.5, refresh=refresh)
    watch = Watch("on_train_batch_end", lambda *_: noise._noises["fc.weight"].target)
    fit(net(), [noise, watch], max_epochs=3)
    assert len({id(target) for target in watch.seen}) == expected
    first = watch.seen[0]
    assert len([t for t in watch.seen if t is first]) == 24 // expected


def test_every_batch_has_masks_of_its_own():
    noise = QuantNoise(PQS, rate=0.5)
    watch = Watch("on_train_batch_end", lambda *_: tuple(noise._noises["fc.weight"].mask.flatten().tolist()))
    fit(net(), [noise, watch])
    assert len(set(watch.seen)) == 16
    other = QuantNoise(PQS, rate=0.5, seed=1)
    again = Watch("on_train_batch_end", lambda *_: tuple(other._noises["fc.weight"].mask.flatten().tolist()))
    fit(net(), [other, again])
    assert not set(again.seen) & set(watch.seen)


class Broken(Callback):
    """Raises in one hook of the sixth batch."""

    def __init__(self, error, hook="on_train_batch_end"):
        setattr(self, hook, lambda trainer, pl_module, *args: self.run(trainer, error))

    def run(self, trainer, error):
        if trainer.fit_loop.total_batch_idx >= 5:
            raise error


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), SystemExit), (ZeroDivisionError(), ZeroDivisionError)]
)
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward", "on_train_batch_end"])
def test_an_interrupted_fit_leaves_a_plain_model(error, raised, hook):
    model = net()
    with pytest.raises(raised):
        fit(model, [QuantNoise(PQS, rate=0.5), Broken(error, hook)])
    assert type(model) is Net
    assert type(model.fc) is nn.Linear
    assert not is_read_noisy(model)


def test_one_callback_serves_two_fits_and_the_second_is_like_the_first():
    noise = QuantNoise(PQS, rate=0.5)
    models = [net(), net(seed=5), net()]
    for model in models:
        fit(model, [noise])
    assert equal(models[0], models[2])
    assert not equal(models[0], models[1])


def test_a_second_fit_of_the_same_trainer():
    model, noise = net(), QuantNoise(PQS, rate=0.5)
    made = fit(model, [noise])
    made.fit_loop.max_epochs = 4
    made.fit(model)
    assert made.current_epoch == 4
    assert not is_noisy(model)


def test_callbacks_that_are_switched_off_do_nothing():
    plain = net(dropout=0.5)
    fit(plain)
    for callback in (QuantNoise(PQS, rate=0.9, enabled=False), QuantNoise(None, rate=0.9)):
        model = net(dropout=0.5)
        watch = Watch("on_train_batch_start", lambda trainer, model: is_noisy(model))
        made = fit(model, [callback, watch])
        assert equal(model, plain)
        assert set(watch.seen) == {False}
        assert "quant_noise/rate" not in made.callback_metrics


def test_the_callback_pickles_before_a_fit_and_is_a_callback_of_both_roots():
    noise = QuantNoise({"*": Int(4)}, rate=LinearRate(0, 0.5), kind="mean", refresh=7, seed=3)
    twin = pickle.loads(pickle.dumps(noise))
    assert (twin.policy, twin.rate, twin.kind, twin.refresh, twin.seed) == (noise.policy, noise.rate, "mean", 7, 3)
    import lightning.pytorch
    import pytorch_lightning

    assert isinstance(noise, pytorch_lightning.Callback)
    assert isinstance(noise, lightning.pytorch.Callback)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Lazy, {}),
        (Manual, {}),
        (Net, {"accumulate_grad_batches": 3}),
        (Net, {"precision": "bf16-mixed"}),
        (Net, {"precision": "bf16-true"}),
        (Net, {"gradient_clip_val": 0.1}),
        (Net, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        (Net, {"max_steps": 5}),
        (Net, {"fast_dev_run": 2}),
    ],
)
def test_kinds_of_fits(cls, options):
    plain, silent, noisy = net(cls=cls), net(cls=cls), net(cls=cls)
    fit(plain, **options)
    fit(silent, [QuantNoise(PQS, rate=0.0)], **options)
    watch = Watch("on_train_batch_start", lambda trainer, model: type(model.fc).__name__)
    fit(noisy, [QuantNoise(PQS, rate=0.9), watch], **options)
    assert equal(silent, plain)
    assert not equal(noisy, plain)
    assert set(watch.seen) == {"NoisyLinear"}
    assert type(noisy.fc) is nn.Linear
