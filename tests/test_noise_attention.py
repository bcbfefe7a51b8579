"""Noise on what enters the projections of torch's attention, against formulas, and in a fit."""

import copy
import pickle

import pytest
import pytorch_lightning as pl
import torch
from attention import HEADS, KEYS, QUERIES, WIDTH, N, attention, formula, inputs, parts_of, per_token
from models import noisy_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qnoise import Int, Quantize, QuantNoise, dequantize, load, quantize
from lightning_qnoise.attach import attach_inputs, detach
from lightning_qnoise.demos import TransformerLM
from lightning_qnoise.input_noise import InputNoise
from lightning_qnoise.layers import packed_weights

A8, STATIC = Int(8, activation=Int(8)), Int(8, activation=Int(8, mode="static"))


def noised(model, policy, rate=1.0, weights=False):
    return noisy_inputs(model, policy, rate, weights)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("quantized", ["qkv", "out", "qkvout"])
@pytest.mark.parametrize("kind", ["self", "memory", "three", "separate"])
def test_rate_one_quantizes_what_enters_every_projection(kind, quantized, by_name):
    options = {"kdim": 12, "vdim": 8} if kind == "separate" else {}
    model = nn.ModuleList([attention(batch_first=True, **options)])
    arguments = inputs(model[0], "three" if kind == "separate" else kind)
    policy = {"0.*_proj_weight": A8 if "qkv" in quantized else None, "0.out_proj": A8 if "out" in quantized else None}
    enter = {name: per_token if name in quantized else torch.Tensor.double for name in ("q", "k", "v", "out")}
    expected = formula(*arguments, *parts_of(model[0]), enter)
    plain = model[0](*arguments)
    noised(model, policy)
    named = dict(zip(("query", "key", "value"), arguments, strict=True))
    found = model[0](**named) if by_name else model[0](*arguments)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=2e-3)  # a tie now and then
    assert (found[0] - expected).norm() < 0.2 * (plain[0] - expected).norm()
    assert found[1].shape == plain[1].shape
    model.eval()
    assert torch.equal(model[0](*arguments)[0], plain[0])


@torch.no_grad()
@pytest.mark.parametrize("need_weights", [False, True])
def test_evaluation_is_to_the_bit_what_it_is_without(need_weights):
    model, x = nn.ModuleList([attention(batch_first=True)]).eval(), torch.randn(N, QUERIES, WIDTH)
    plain = model[0](x, x, x, need_weights=need_weights)[0]
    noised(model, {"*": A8}, weights=True)
    assert torch.equal(model[0](x, x, x, need_weights=need_weights)[0], plain)


def test_one_projection_of_three():
    model = nn.ModuleList([attention(batch_first=True, kdim=12, vdim=8)])
    arguments = inputs(model[0], "three")
    enter = dict.fromkeys(["q", "v", "out"], torch.Tensor.double) | {"k": per_token}
    expected = formula(*arguments, *parts_of(model[0]), enter)
    noised(model, {"0.k_proj_weight": A8})
    torch.testing.assert_close(model[0](*arguments)[0].double(), expected, rtol=1e-4, atol=2e-3)


def test_the_gradient_passes_straight_through():
    model, x = nn.ModuleList([attention(batch_first=True)]), torch.randn(N, QUERIES, WIDTH, requires_grad=True)
    model[0](x, x, x)[0].sum().backward()
    plain, x.grad = x.grad, None
    noised(model, {"*": A8})
    model[0](x, x, x)[0].sum().backward()
    assert 0 < (x.grad - plain).norm() < 0.1 * plain.norm()


def test_a_running_range_covers_query_key_and_value():
    noise = InputNoise(STATIC.activation, (3 * WIDTH, WIDTH), "in_proj_weight")
    model = attention(batch_first=True)
    attach_inputs(model, {"in_proj_weight": noise})
    query, key, value = inputs(model, "three")
    for factor in (1.0, 2.0):
        seen = factor * query, 3 * factor * key, 0.1 * factor * value
        ends = torch.tensor([min(x.min() for x in seen), max(x.max() for x in seen)])
        before = noise.ends
        model(*seen)
        noise.follow()
        torch.testing.assert_close(noise.ends, ends if before is None else before.lerp(ends, 0.1))


def test_keys_that_are_the_values_have_two_ranges_where_they_have_two_projections():
    model, query = nn.ModuleList([attention(batch_first=True, kdim=12, vdim=12)]), torch.randn(N, QUERIES, WIDTH)
    noises, memory = noised(model, {"*": STATIC}), torch.randn(N, KEYS, 12)
    plain = copy.deepcopy(model)[0](query, memory, memory)[0]
    assert not torch.equal(model[0](query, memory, memory)[0], plain)
    noises.follow()
    assert all(noise.ends is not None for noise in noises.of.values()) and len(noises.of) == 4
    noises.stop()
    torch.testing.assert_close(model[0](query, memory, memory)[0], plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("scheme", [A8, STATIC], ids=str)
def test_recomputation_sees_the_same_noise(scheme, reentrant):
    model, x = attention(batch_first=True), torch.randn(N, QUERIES, WIDTH)
    noises = noised(model, {"*": scheme}, rate=0.5, weights=True)

    def run(forward):
        model.zero_grad()
        start = x.clone().requires_grad_()
        forward(start).square().sum().backward()
        noises.follow()
        for noise in noises.of.values():
            noise.ends = None
        return [start.grad, *(p.grad.clone() for p in model.parameters())]

    def own(x):
        return model(x, x, x)[0]

    for one, other in zip(run(own), run(lambda x: checkpoint(own, x, use_reentrant=reentrant)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_leaves_without_a_trace():
    model, x = nn.Sequential(attention(batch_first=True)), torch.randn(N, QUERIES, WIDTH)
    before = {name: (type(m), vars(m).keys()) for name, m in model.named_modules()}
    noised(model, {"*": A8}, weights=True)
    assert type(copy.deepcopy(model)[0]) is nn.MultiheadAttention
    model[0](x, x, x)
    detach(model)
    assert {name: (type(m), vars(m).keys()) for name, m in model.named_modules()} == before


class Seen(pl.Callback):
    """Keeps what attention was in the last training batch, and the noise of its `out_proj`."""

    def on_train_batch_end(self, trainer, module, *args):
        self.classes = {type(layer.self_attn).__name__ for layer in module.layers}
        self.ranges = [layer.self_attn.out_proj.__dict__["_quant_input_noises"]["input"] for layer in module.layers]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*val_loader.*")
def test_a_fit(tmp_path):
    torch.manual_seed(0)
    model = TransformerLM(vocab_size=20, context=KEYS, d_model=16, n_heads=2, d_ffn=32)
    rows = torch.randint(20, (32, KEYS + 1))
    loader = torch.utils.data.DataLoader(list(zip(rows[:, :-1], rows[:, 1:], strict=True)), batch_size=8)
    seen = Seen()
    callbacks = [QuantNoise(STATIC, rate=0.5), Quantize(STATIC, path=str(tmp_path / "m.safetensors")), seen]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **options)
    trainer.fit(model, loader, loader)
    assert seen.classes == {"NoisyMultiheadAttention"} and all(noise.ends is not None for noise in seen.ranges)
    assert {type(layer.self_attn).__name__ for layer in model.layers} == {"PackedMultiheadAttention"}
    quantized = {name for name, packed in packed_weights(model) if packed.scheme.activation}
    assert quantized >= {"layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj.weight"}
    again = load(TransformerLM(**model.hparams), tmp_path / "m.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(rows[:, :-1]), model.eval()(rows[:, :-1]))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("padded", [False, True])
def test_evaluation_within_a_stage_is_that_of_the_packed_model(padded):
    """Where torch's encoder would bypass its layers, and make nested tensors of padded sequences."""
    torch.manual_seed(0)
    packed = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True), 2).eval()
    quantize(packed, {"*": Int(8, activation=Int(4))})
    model = dequantize(copy.deepcopy(packed))
    padding = torch.arange(KEYS) >= torch.tensor([[KEYS], [3], [4]]) if padded else None
    x, options = torch.randn(N, KEYS, WIDTH), {"src_key_padding_mask": padding}
    floats, expected = model(x, **options), packed(x, **options)
    weights = {name: weight for name, weight in packed_weights(packed)}
    attach_inputs(model, {n: InputNoise(w.scheme.activation, w.shape, n, in_eval=True) for n, w in weights.items()})
    found = model(x, **options)
    assert (found - expected).norm() < 0.05 * (floats - expected).norm()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(module._forward_pre_hooks for module in copied.modules())
        assert torch.equal(copied(x, **options), floats)
    detach(model)
    assert torch.equal(model(x, **options), floats)
    assert not any(module._forward_pre_hooks for module in model.modules())
