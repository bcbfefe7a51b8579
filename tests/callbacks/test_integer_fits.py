"""Quantized activations inside a fit: noise on inputs, calibration at the end, stages, resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fits import Manual, Net, NoValidation, checkpoint, equal, fit, net, rows
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qnoise import PQ, Finetune, Int, Quantize, QuantNoise, load, quantize
from lightning_qnoise.attach import NoisyLayer

STATIC = Int(8, activation=Int(8, mode="static"))
DYNAMIC = Int(4, activation=Int(4))
HERE = Path(__file__).parent
resumes = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
)


class Same(Net):
    """Eight batches with the same rows: Lightning does not restore the place in a plain DataLoader."""

    def train_dataloader(self):
        x, y = next(iter(super().train_dataloader()))
        return DataLoader(TensorDataset(x.repeat(8, 1), y.repeat(8)), 8)


def inputs(model, loader):
    """What enters `fc` and `head` of a float or packed net, over a loader."""
    seen = {"fc.weight": [], "head.weight": []}
    with torch.no_grad():
        for x, _ in loader:
            seen["fc.weight"].append(x)
            seen["head.weight"].append(F.relu(F.linear(x, model.fc.weight, model.fc.bias)))
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_static_ranges_come_from_the_training_data():
    model = net()
    fit(model, [Quantize(STATIC, calibration=100)])
    for name, x in inputs(model, rows()).items():
        packed = model.get_submodule(name.split(".")[0]).packed("weight")
        low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
        assert packed.input_scale.item() == pytest.approx((high - low) / 255, rel=1e-5)
        assert packed.input_zero_point.item() == round(-low / packed.input_scale.item())


def test_the_number_of_batches_is_kept():
    model = net()
    fit(model, [Quantize(STATIC, calibration=2)])
    x = torch.cat([x for x, _ in list(rows())[:2]])
    assert model.fc.packed("weight").input_scale.item() == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-5)


def test_the_names_of_a_training_step_are_the_users_own():
    class Named(Net):
        def training_step(self, pair, i):
            return super().training_step(pair, i)

    model = net(cls=Named)
    fit(model, [Quantize(STATIC)])
    assert model.fc.packed("weight").input_scale.isfinite()


def test_the_file_evaluates_bit_identically_in_any_order():
    model = net()
    fit(model, [QuantNoise(STATIC, 0.5), Quantize()])
    loaded, x = load(net(seed=5), "quantized.safetensors"), rows()
    model.eval(), loaded.eval()
    batch = torch.cat([b for b, _ in x])
    assert torch.equal(loaded(batch), model(batch))
    order = torch.randperm(len(batch))
    torch.testing.assert_close(loaded(batch[order]), model(batch)[order], rtol=0, atol=1e-5)


def test_training_through_the_noise_is_quantization_aware_training_by_hand():
    """Rate 1 and a dynamic activation, against a net whose forward quantizes by formulas of its own."""

    def fake(x, bits, dim):
        low, high = x.amin(dim, keepdim=True).clamp(max=0), x.amax(dim, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round()
        return x + ((((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale - x).detach()

    class ByHand(Net):
        def forward(self, x):
            if not self.training:
                return super().forward(x)
            hidden = F.relu(F.linear(fake(x, 4, 1), fake(self.fc.weight, 4, 1), self.fc.bias))
            return F.linear(fake(hidden, 4, 1), fake(self.head.weight, 4, 1), self.head.bias)

    ours, theirs = net(), net(cls=ByHand)
    fit(ours, [QuantNoise(DYNAMIC, 1.0)])
    fit(theirs)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_half_the_elements_are_noised_and_validation_sees_none():
    seen = {"train": [], "val": 0}

    class Spy(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            noise = trainer.callbacks[0]._inputs.of["fc.weight"]
            seen["train"].append((noise.active, noise.mask.float().mean().item()))

        def on_validation_batch_start(self, trainer, pl_module, *args):
            seen["val"] += trainer.callbacks[0]._inputs.of["fc.weight"].active

    fit(net(), [QuantNoise(STATIC, 0.5), Spy()])
    assert all(active and abs(rate - 0.5) < 0.01 for active, rate in seen["train"])
    assert len({rate for _, rate in seen["train"]}) == 16 and seen["val"] == 0


@resumes
@pytest.mark.parametrize(
    "policy", [STATIC, DYNAMIC, Int(4, range="mse", activation=Int(4, mode="static", range="mse"))]
)
def test_resume_is_bit_equal(policy):
    whole = net(cls=Same)
    fit(whole, [QuantNoise(policy, 0.5, refresh=3), Quantize(), checkpoint(every_n_train_steps=4)], max_epochs=2)
    for path in ("epoch=0-step=8", "epoch=0-step=4", "epoch=1-step=12"):
        resumed = net(cls=Same, seed=9)
        fit(resumed, [QuantNoise(policy, 0.5, refresh=3), Quantize()], max_epochs=2, ckpt_path=f"ckpt/{path}.ckpt")
        assert equal(resumed, whole), path


@resumes
def test_without_its_ranges_a_resumed_fit_goes_elsewhere():
    whole = net(cls=Same)
    fit(whole, [QuantNoise(STATIC, 0.5), checkpoint()])
    state = torch.load("ckpt/epoch=0-step=8.ckpt")
    assert state["callbacks"]["QuantNoise"]["inputs"].keys() == {"fc.weight", "head.weight"}
    state["callbacks"]["QuantNoise"]["inputs"] = {"fc.weight": torch.tensor([-0.1, 0.1])}
    torch.save(state, "changed.ckpt")
    resumed = net(cls=Same)
    fit(resumed, [QuantNoise(STATIC, 0.5)], ckpt_path="changed.ckpt")
    assert not equal(resumed, whole)


@resumes
@pytest.mark.parametrize("stages", [None, ["fc", "head"]])
def test_stages_quantize_inputs_and_resume_bit_equally(stages):
    policy = {"fc": PQ(8, 16, codebook=Int(8, "tensor"), activation=Int(8, mode="static")), "head": STATIC}
    settings = {"policy": policy, "stages": stages or "joint", "finetune": Finetune(steps=6)}
    whole, resumed = net(cls=Same), net(cls=Same, seed=9)
    fit(whole, [Quantize(**settings), checkpoint(every_n_train_steps=3)])
    state = torch.load("ckpt/epoch=2-step=21.ckpt")["callbacks"]["Quantize"]
    assert "input_ends" in state["held"]["fc.weight"]
    fit(resumed, [Quantize(**settings)], ckpt_path="ckpt/epoch=2-step=21.ckpt")
    assert equal(resumed, whole)


def test_a_stage_sees_quantized_inputs_in_training_and_validation():
    values = {True: [], False: []}

    class Count(Net):
        def forward(self, x):
            if isinstance(self.fc, NoisyLayer) and self.fc.__dict__["_quant_input_noises"]:
                hidden = []
                handle = self.fc.register_forward_hook(lambda m, args, out: hidden.append(out))
                super().forward(x[:1])
                handle.remove()
                noise = self.fc.__dict__["_quant_input_noises"]["input"]
                values[self.training].append(len(noise.apply(x[:1], False).unique()))
                torch.testing.assert_close(hidden[0], F.linear(noise.apply(x[:1], False), self.fc.weight, self.fc.bias))
            return super().forward(x)

    model = net(cls=Count)
    fit(model, [Quantize(Int(8, activation=Int(2)), "joint", Finetune(steps=4, guidance=None))])
    assert values[True] and values[False]
    assert max(values[True] + values[False]) <= 4
    assert type(model.fc).__name__ == "PackedLinear"


def test_lsq_moves_scales_and_packs_on_them():
    scheme = Int(3, range="lsq")
    start, model = net(), net()
    fit(start, [])
    fit(model, [Quantize(scheme, "joint", Finetune(steps=16))])
    first, last = scheme.encode(start.fc.weight), model.fc.packed("weight")
    assert not torch.allclose(first.scale, last.scale, rtol=1e-3)
    assert 0.3 < (last.scale / first.scale).mean() < 3
    codes = last.decode() / last.scale + last.zeros
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


def test_gptq_reads_the_fits_own_data():
    scheme = Int(2, rounding="gptq")
    trained, ours, plain = net(), net(), net()
    fit(trained)
    fit(ours, [Quantize(scheme, calibration=8)])
    fit(plain, [Quantize(Int(2))])
    by_hand = quantize(trained, scheme, rows(), 8)
    assert equal(by_hand, ours)
    assert not equal(ours, plain)


@pytest.mark.filterwarnings("ignore:.*does not have:UserWarning", "ignore:You passed in a:UserWarning")
def test_manual_optimization_calibrates_on_validation_data():
    model = net(cls=Manual)
    fit(model, [Quantize(STATIC)])
    x = torch.cat([x for x, _ in rows(32)])
    assert model.fc.packed("weight").input_scale.item() == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "cls", "message"),
    [
        ({"policy": STATIC, "calibration": 0}, Net, r"'fc.weight' needs data.*calibration=8"),
        ({"policy": Int(4, rounding="gptq"), "stages": "joint"}, Net, "gptq.*one shot"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, cls, message):
    model = net(cls=cls)
    with pytest.raises(ValueError, match=message):
        fit(model, [Quantize(**options)])
    assert equal(model, net(cls=cls))


def test_manual_optimization_without_validation_is_refused():
    class Both(Manual, NoValidation):
        pass

    with pytest.raises(ValueError, match=r"manual optimization.*validation_step"):
        fit(net(cls=Both), [Quantize(STATIC)])


def test_batchnorm_and_static_ranges_fit_each_other():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

        def forward(self, x):
            return self.head(F.relu(self.norm(self.fc(x))))

    model = net(cls=Normed)
    done = fit(model, [Quantize(Int(4, activation=Int(4, mode="static")), calibration=100)])
    assert done.callback_metrics["quantized/val_acc"] > 0.5
    with torch.no_grad():
        x = torch.cat([x for x, _ in rows()])
        model.eval()
        before = F.relu(model.norm(model.fc(x)))
    scale = before.max().item() / 15
    assert model.head.packed("weight").input_scale.item() == pytest.approx(scale, rel=0.1)


def test_sanity_check_and_learning_rate_finder_leave_the_ranges():
    with_extras, plain = net(), net()
    seen = {}

    class Read(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            noise = next(c for c in trainer.callbacks if isinstance(c, QuantNoise))
            seen.setdefault("ends", noise._inputs.of["fc.weight"].ends)

    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    fit(with_extras, [finder, QuantNoise(STATIC, 0.5), Read(), Quantize()], num_sanity_val_steps=2)
    assert seen["ends"] is None  # before its own first batch it has seen nothing
    fit(plain, [QuantNoise(STATIC, 0.5), Quantize()])
    assert torch.equal(with_extras.fc.packed("weight").input_scale, plain.fc.packed("weight").input_scale)


@resumes
def test_a_finished_fit_resumes_with_its_ranges():
    first, again = net(), net(seed=9)
    trainer = fit(first, [Quantize(STATIC)])
    trainer.save_checkpoint("after.ckpt")
    fit(again, [Quantize(STATIC)], ckpt_path="after.ckpt")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)  # scales are found anew from the decoded weights
        assert "input" not in name or torch.equal(again.state_dict()[name], value)


def test_a_float_checkpoint_loads_into_the_packed_model_and_keeps_its_ranges():
    model = net()
    trainer = fit(model, [Quantize(STATIC), checkpoint()])
    scale = model.fc.packed("weight").input_scale.clone()
    trainer.test(model, ckpt_path="ckpt/epoch=0-step=8.ckpt", verbose=False)
    assert torch.equal(model.fc.packed("weight").input_scale, scale)


def test_an_interrupted_fit_leaves_a_plain_model():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 20:
                raise RuntimeError("stop")

    for callbacks in ([QuantNoise(STATIC, 0.5)], [Quantize(STATIC, "joint", Finetune(steps=8))]):
        model = net()
        with pytest.raises(RuntimeError, match="stop"):
            fit(model, [*callbacks, Stop()], max_epochs=3 if "Noise" in type(callbacks[0]).__name__ else 2)
        x, other = next(iter(rows()))[0], net()
        other.load_state_dict(model.state_dict())
        model.eval(), other.eval()
        assert torch.equal(model(x), other(x))


def test_two_ranks_hold_the_same_ranges(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "two_ranks_static.py")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert equal(zero, one)
    assert {name for name in zero if "input" in name} == {
        f"{layer}.weight.input_{part}" for layer in ("fc", "head") for part in ("scale", "zero_point")
    }
    assert zero["fc.weight.input_scale"].isfinite()
