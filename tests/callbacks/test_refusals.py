"""What cannot work is refused before the first batch, in words that name the remedy."""

import math

import pytest
import torch
from fits import PQS, ROOTS, Net, fit, net, trainer
from pytorch_lightning import Callback
from torch import nn

from lightning_qnoise import PQ, ConstantRate, Int, LinearRate, Quantize, QuantNoise, quantize


class Count(Callback):
    """Counts training batches."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_start(self, *args):
        self.batches += 1


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("callback", [QuantNoise, Quantize])
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"encoder.*": Int(8)}, r"'encoder.\*' in the policy matches no layer or parameter"),
        ({"fc": PQ(7, 8)}, "cannot cut rows of 16 elements"),
        ({"type:Conv2d": Int(8)}, "matches no layer or parameter"),
    ],
)
def test_a_policy_that_does_not_fit_raises_before_the_first_batch(callback, policy, message, root):
    model, count = net(root), Count()
    with pytest.raises(ValueError, match=message):
        fit(model, [callback(policy), count], root)
    assert count.batches == 0
    assert type(model) is type(net(root))
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("policy", ["int3", {"fc": "int3"}])
def test_an_unknown_preset_raises_when_the_callback_is_made(policy):
    for callback in (QuantNoise, Quantize):
        with pytest.raises(ValueError, match="unknown preset 'int3'; choose from int8"):
            callback(policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, r"rate must lie in \[0, 1\], got 1.5"),
        ({"rate": math.nan}, r"rate must lie in \[0, 1\], got nan"),
        ({"kind": "median"}, "kind must be one of exact, zero, mean, got 'median'"),
        ({"refresh": 0}, "refresh must be 'epoch' or a number of batches >= 1, got 0"),
        ({"refresh": "step"}, "refresh must be 'epoch' or a number of batches >= 1, got 'step'"),
    ],
)
def test_a_wrong_argument_raises_when_the_callback_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        QuantNoise("int8", **options)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_a_rate_outside_bounds_from_a_user_s_function_raises(value):
    model, count = net(), Count()
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        fit(model, [QuantNoise("int8", rate=lambda progress: value if progress > 0.4 else 0.1), count])
    assert count.batches == 7
    assert type(model.fc) is nn.Linear


def sharded(name, callback):
    made = trainer([callback])
    made.strategy.__class__ = type(f"My{name}", (type(name, (type(made.strategy),), {}),), {})
    return made


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
@pytest.mark.parametrize("callback", [QuantNoise("int8"), Quantize("int8")])
def test_a_sharded_strategy_is_refused(name, callback):
    if name == "ModelParallelStrategy" and isinstance(callback, Quantize):
        pytest.skip("Quantize works under FSDP2: test_stages_ddp.py")
    with pytest.raises(ValueError, match=f"My{name} shards them; use strategy='ddp'"):
        sharded(name, callback).fit(net())


def test_a_sharded_model_cannot_teach():
    with pytest.raises(ValueError, match=r"cannot be copied as a teacher: pass Finetune\(guidance=None\)"):
        sharded("ModelParallelStrategy", Quantize("int8", "joint")).fit(net())


@pytest.mark.parametrize("rate", [LinearRate(0, 0.5), lambda progress: 0.1])
def test_a_schedule_needs_an_end(rate):
    with pytest.raises(ValueError, match="needs the length of the training: set max_epochs or max_steps"):
        fit(net(), [QuantNoise("int8", rate=rate)], max_epochs=-1, max_time={"seconds": 1})
    fit(net(), [QuantNoise("int8", rate=ConstantRate(0.1))], max_epochs=-1, max_time={"seconds": 0.2})
    fit(net(), [QuantNoise("int8", rate=rate)], max_epochs=-1, max_steps=3)


@pytest.mark.parametrize("callback", [QuantNoise, Quantize])
def test_two_of_a_kind_are_refused(callback):
    with pytest.raises((ValueError, RuntimeError), match=r"2 Quantize callbacks|more than one stateful callback"):
        fit(net(), [callback("int8"), callback("int4")])
    fit(net(), [callback("int8"), callback("int4", enabled=False)])


def test_quantize_without_any_policy_is_refused():
    with pytest.raises(ValueError, match="takes its policy from QuantNoise, but the trainer has none; pass a policy"):
        fit(net(), [Quantize()])


@pytest.mark.parametrize("callback", [QuantNoise("int8"), Quantize("int8")])
def test_a_packed_model_cannot_be_fitted_again(callback):
    model = net()
    fit(model, [Quantize(PQS, path=None)])
    with pytest.raises(ValueError, match=r"already packed, so .* call dequantize\(model\) first"):
        fit(model, [callback])
    assert type(model.fc).__name__ == "PackedLinear"


def test_a_layer_that_is_not_initialized_is_refused():
    class Lazy(Net):
        def __init__(self):
            super().__init__()
            self.fc = nn.LazyLinear(32)

    with pytest.raises(ValueError, match="is not initialized yet: run one batch through the model first"):
        fit(net(cls=Lazy), [QuantNoise({"fc": Int(8)})])


def test_a_model_that_was_loaded_packed_still_validates():
    model = quantize(net(), PQS)
    with torch.no_grad():
        expected = trainer().validate(model, verbose=False)
    assert trainer([QuantNoise("int8"), Quantize()]).validate(model, verbose=False) == expected
