"""Attention that calls its projections: torch's own to the last option, and quantized inputs as in formulas."""

import copy
import pickle
from inspect import signature
from itertools import product

import pytest
import torch
from attention import HEADS, KEYS, QUERIES, WIDTH, N, attention, formula, inputs, on_grid, parts_of, per_token
from torch import nn

from lightning_qnoise import PQ, Int, dequantize, load, quantize, save
from lightning_qnoise.calibrate import calibrate
from lightning_qnoise.layers import PackedAttention, PackedLayer, attend, packed_weights
from lightning_qnoise.policy import resolve


def masks(kind, n_keys, batched=True):
    n = N if batched else 1
    padding = torch.arange(n_keys) >= torch.tensor([[n_keys], [3], [4]][:n])
    return {
        "none": {},
        "added": {"attn_mask": torch.randn(QUERIES, n_keys)},
        "heads": {"attn_mask": torch.rand(n * HEADS, QUERIES, n_keys) < 0.2},
        "padding": {"key_padding_mask": padding if batched else padding[0]},
        "both": {
            "attn_mask": torch.rand(QUERIES, n_keys) < 0.1,
            "key_padding_mask": padding if batched else padding[0],
        },
    }[kind]


def same(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, equal_nan=True)


OPTIONS = [{}, {"bias": False, "add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]


@pytest.mark.parametrize("options", [*OPTIONS, {"kdim": 12, "vdim": 10}], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_is_torchs(options, training, batch_first):
    module = attention(batch_first=batch_first, dropout=0.3, **options).train(training)
    kinds = ["three"] if "kdim" in options else ["self", "memory", "values", "three"]
    for kind, batched, mask, (need, average) in product(
        kinds,
        [True, False],
        ["none", "added", "heads", "padding", "both"],
        [(True, True), (True, False), (False, True)],
    ):
        query, key, value = inputs(module, kind, batched)
        n_keys = key.shape[-2] if batch_first or not batched else key.shape[0]
        settings = dict(need_weights=need, average_attn_weights=average, **masks(mask, n_keys, batched))
        torch.manual_seed(1)
        expected = module(query, key, value, **settings)
        torch.manual_seed(1)  # the same dropout, too
        same(attend(module, query, key, value, **settings), expected)


@pytest.mark.parametrize(("n", "padded"), [(0, False), (1, False), (N, False), (N, True)])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_and_empty(n, need_weights, padded):
    module, x = attention(batch_first=True), torch.randn(n, QUERIES, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    settings = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if padded:
        settings["key_padding_mask"] = torch.zeros(n, QUERIES).masked_fill(torch.arange(QUERIES) > 2, -torch.inf)
    same(attend(module, x, x, x, **settings), module(x, x, x, **settings))


def test_gradients_are_torchs():
    module = attention(batch_first=True)
    gradients = []
    for forward in (module, lambda *args: attend(module, *args)):
        torch.manual_seed(2)
        query, key, value = (x.requires_grad_() for x in inputs(module, "three"))
        forward(query, key, value)[0].square().sum().backward()
        gradients.append([query.grad, key.grad, value.grad, *(p.grad.clone() for p in module.parameters())])
        module.zero_grad()
    same(*gradients)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attn_mask": torch.zeros(1, KEYS)}, r"attn_mask must have the shape \[5, 7\] or \[12, 5, 7\], got \[1, 7\]"),
        ({"key_padding_mask": torch.zeros(1, KEYS)}, r"key_padding_mask must have the shape \[3, 7\], got \[1, 7\]"),
        ({"is_causal": True}, "pass the causal mask, too"),
    ],
)
def test_what_does_not_fit(settings, message):
    module = attention(batch_first=True)
    with pytest.raises(ValueError, match=message):
        attend(module, *inputs(module, "memory"), **settings)


A8, STATIC = Int(8, activation=Int(8)), Int(8, activation=Int(8, mode="static"))


@torch.no_grad()
@pytest.mark.parametrize("scheme", [A8, PQ(4, 16, codebook=Int(8, "tensor"), activation=Int(8))], ids=str)
@pytest.mark.parametrize("kind", ["self", "memory", "three", "separate"])
def test_inputs_of_all_projections_are_quantized(kind, scheme):
    model = nn.ModuleList([attention(batch_first=True, **({"kdim": 12, "vdim": 8} if kind == "separate" else {}))])
    quantize(model, {"*": scheme})
    assert isinstance(model[0], PackedAttention)
    query, key, value = inputs(model[0], "three" if kind == "separate" else kind)
    found = model[0](query, key, value, need_weights=False)[0]
    expected = formula(query, key, value, *parts_of(model[0]), dict.fromkeys(["q", "k", "v", "out"], per_token))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)  # a value on a tie takes the other level
    floats = formula(query, key, value, *parts_of(model[0]), dict.fromkeys(["q", "k", "v", "out"], torch.Tensor.double))
    assert (floats - expected).norm() > 20 * (found - expected).norm()


@torch.no_grad()
def test_a_static_range_covers_query_key_and_value():
    model = nn.ModuleList([attention(batch_first=True)])
    quantize(model, {"*": STATIC})
    model.forward = lambda batch: model[0](*batch)
    query, key, value = inputs(model[0], "three")
    key, value = 3 * key, 2 * value
    calibrate(model, [[(query, key, value)]])
    packed = model[0].packed("in_proj_weight")
    seen = torch.cat([x.flatten() for x in (query, key, value)])
    torch.testing.assert_close(packed.input_scale, (seen.max() - seen.min()) / 255)
    enter = {name: lambda x: on_grid(x, packed.input_scale, packed.input_zero_point) for name in "qkv"}
    out = model[0].out_proj.packed("weight")
    enter["out"] = lambda x: on_grid(x, out.input_scale, out.input_zero_point)
    found = model[0](query, key, value, need_weights=False)[0]
    expected = formula(query, key, value, *parts_of(model[0]), enter)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-2)
    assert (found - expected).norm() < 1e-3 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = quantize(nn.ModuleList([attention(batch_first=True)]), {"*": A8})
    x = torch.randn(N, QUERIES, WIDTH)
    expected = model[0](x, x, x)
    half = model.to(dtype)[0](*[x.to(dtype)] * 3)
    assert half[0].dtype == half[1].dtype == dtype
    same([part.float() for part in half], expected, tolerance=0.1)


@torch.no_grad()
def test_out_proj_alone(tmp_path):
    plain = nn.Sequential(attention(batch_first=True)).eval()
    model = quantize(copy.deepcopy(plain), {"0.out_proj": A8})
    x = torch.randn(N, QUERIES, WIDTH)
    enter = dict.fromkeys("qkv", torch.Tensor.double) | {"out": per_token}
    expected = formula(x, x, x, *parts_of(model[0]), enter)
    found = model[0](x, x, x)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied[0](x, x, x)[0], found)
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(copy.deepcopy(plain), tmp_path / "m.safetensors")[0](x, x, x)[0], found)
    assert not model.load_state_dict(model.state_dict()).missing_keys
    assert type(dequantize(model)[0]) is nn.MultiheadAttention and not isinstance(model[0].out_proj, PackedLayer)


def test_a_failed_calibration_leaves_attention_as_it_was():
    model = nn.Sequential(attention(batch_first=True))
    with pytest.raises(TypeError):  # the loader's batches are no inputs of it
        quantize(model, {"0.out_proj": STATIC}, loader=[torch.randn(N, QUERIES, WIDTH)])
    assert type(model[0]) is nn.MultiheadAttention


class Own(nn.MultiheadAttention):
    """Reads its projections in a forward of its own."""

    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_a_forward_that_was_set_on_attention_keeps_float_inputs():
    model = nn.Sequential(attention(), nn.Linear(WIDTH, WIDTH))
    own = model[0].forward
    model[0].forward = lambda x: own(x, x, x)[0]
    with pytest.warns(UserWarning, match=r"0\.in_proj_weight, 0\.out_proj\.weight stays float"):
        schemes = resolve(model, A8)
    assert {name for name, scheme in schemes.items() if scheme.activation} == {"1.weight"}


def test_attention_with_a_forward_of_its_own_keeps_float_inputs():
    model = nn.Sequential(Own(WIDTH, HEADS), nn.Linear(WIDTH, WIDTH))
    with pytest.warns(UserWarning, match=r"0\.in_proj_weight, 0\.out_proj\.weight stays float"):
        schemes = resolve(model, A8)
    assert {name for name, scheme in schemes.items() if scheme.activation} == {"1.weight"}
    with pytest.raises(ValueError, match=r"layer '0.out_proj.weight'.*cannot be quantized"):
        quantize(model, {"0.out_proj": A8})


class Doubled(nn.Linear):
    """Torch's attention would read its weight and never call it."""

    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_an_out_proj_of_the_users_own_is_read_as_torch_reads_it():
    plain = attention(batch_first=True)
    own = copy.deepcopy(plain)
    own.out_proj = Doubled(WIDTH, WIDTH)
    own.out_proj.load_state_dict(plain.out_proj.state_dict())
    x, policy = torch.randn(N, QUERIES, WIDTH), {"0.in_proj_weight": A8}
    expected, found = (quantize(nn.Sequential(module), policy)[0](x, x, x) for module in (plain, own))
    same(found, expected)


ENCODERS = {"norm last": {}, "norm first": {"norm_first": True}, "gelu": {"activation": "gelu"}}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("scheme", [A8, STATIC, Int(8)], ids=str)
def test_an_encoder_of_padded_sequences(options, scheme):
    """In eval mode torch makes nested tensors of them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, **options)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(N, KEYS, WIDTH), masks("padding", KEYS)["key_padding_mask"]
    floats = encoder(x, src_key_padding_mask=padding)
    quantize(encoder, {"*": scheme}, loader=[x])
    found = encoder(x, src_key_padding_mask=padding)
    encoder.use_nested_tensor = False
    expected = encoder(x, src_key_padding_mask=padding)
    for row, length in enumerate((~padding).sum(dim=1)):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=1e-3, atol=0.02)
        assert 0 < (found[row, :length] - floats[row, :length]).abs().max() < 0.2
    assert len(list(packed_weights(encoder))) == 8


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_gptq_of_an_encoder_of_padded_sequences():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True), 1).eval()
    padding = masks("padding", KEYS)["key_padding_mask"]
    for bias in (encoder.layers[0].self_attn.in_proj_bias, encoder.layers[0].self_attn.out_proj.bias):
        nn.init.normal_(bias)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = copy.deepcopy(encoder)

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=padding)

    mix = torch.randn(WIDTH, WIDTH) @ torch.randn(WIDTH, WIDTH)  # features that go together
    batches = [torch.randn(N, KEYS, WIDTH) @ mix for _ in range(8)]
    errors = {}
    for rounding in ("nearest", "gptq"):
        model = quantize(Model(), {"*.self_attn.*": Int(3, rounding=rounding)}, batches)
        errors[rounding] = sum((model(x) - Model()(x))[~padding].square().sum().item() for x in batches)
    assert errors["gptq"] < 0.75 * errors["nearest"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("scheme", [A8, Int(8), PQ(4, 16)], ids=str)
def test_a_linear_layer_of_nested_sequences(scheme, layout):
    model = quantize(nn.Sequential(nn.Linear(WIDTH, WIDTH)), {"*": scheme})
    parts = [torch.randn(n, WIDTH) for n in (3, 1, 4)]
    x = torch.nested.as_nested_tensor(parts, layout=layout)
    found = model(x)
    assert found.is_nested and found.layout is layout
    same(found.unbind(), [model(part) for part in parts])
    same((x + found).unbind(), [part + model(part) for part in parts])  # of the same ragged shape


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_no_padding_of_nested_sequences_enters_a_projection():
    model, seen = quantize(nn.Sequential(attention(batch_first=True)), {"*": A8}), []
    for _, packed in packed_weights(model):
        packed.quantize_input = lambda x, own=packed.quantize_input: seen.append(x) or own(x)
    parts = [torch.randn(n, WIDTH) for n in (6, 1, 2)]
    x = torch.nested.nested_tensor(parts)
    found = model[0](x, x, x)[0]
    assert [list(rows.shape) for rows in seen] == [[9, WIDTH]] * 2
    torch.testing.assert_close(seen[0], torch.cat(parts))
    for one, part in zip(found.unbind(), parts, strict=True):
        torch.testing.assert_close(one, model[0](part, part, part)[0], rtol=1e-4, atol=0.02)  # a tie now and then


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("case", ["cross", "positions first", "padding"])
def test_other_nested_inputs_are_refused(case):
    module = quantize(nn.Sequential(attention(batch_first=case != "positions first")), {"*": A8})[0]
    x = torch.nested.nested_tensor([torch.randn(3, WIDTH)])
    padding = torch.zeros(1, 3, dtype=torch.bool) if case == "padding" else None
    with pytest.raises(ValueError, match=r"nested tensors of the strided layout are for self-.*to_padded_tensor"):
        module(x, x, x + x if case == "cross" else x, key_padding_mask=padding)


def test_gradients_pass_straight_through():
    model = quantize(nn.Sequential(attention(batch_first=True)), {"*": A8})
    twin = dequantize(copy.deepcopy(model))
    x = torch.randn(N, QUERIES, WIDTH)
    gradients = []
    for module in (model[0], twin[0]):
        own = x.clone().requires_grad_()
        module(own, own, own)[0].sum().backward()
        gradients.append(own.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 16), (7, 16), (6, 16)],
        [(3, 5, 16), (1, 7, 16), (1, 7, 16)],
        [(3, 5, 16), (5, 16), (5, 16)],
        [(1, 3, 5, 16)] * 3,
    ],
)
def test_inputs_that_do_not_belong_together(shapes):
    with pytest.raises(ValueError, match="must have 2 or 3 dimensions, and those of one batch, got"):
        attend(attention(batch_first=True), *(torch.randn(shape) for shape in shapes))


def test_the_forward_has_torchs_arguments():
    model = quantize(attention(), {"*": A8})
    assert list(signature(model.forward).parameters) == list(signature(attention().forward).parameters)


def test_compiles_without_a_break():
    model = quantize(nn.Sequential(attention(batch_first=True)), {"*": A8})
    x = torch.randn(N, QUERIES, WIDTH)
    with torch.no_grad():
        compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
        same(compiled(x, x, x), model[0](x, x, x), tolerance=1e-3)
