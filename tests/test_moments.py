"""Columns of inputs: times the weight as a matrix they are the layer's output."""

import pytest
import torch
from attention import WIDTH, attention, formula, inputs, parts_of
from torch import nn

from lightning_qnoise import Int
from lightning_qnoise.calibrate import collecting
from lightning_qnoise.moments import input_columns

CONVS = [
    {"padding": padding, "padding_mode": mode, "stride": stride, "dilation": dilation, "groups": groups}
    for mode in ("zeros", "reflect", "replicate", "circular")
    for padding in (0, 2, "same", "valid")
    for stride, dilation in ((1, 1), (2, 1), (1, 2), (3, 2))
    for groups in (1, 2, 4)
    if not (padding == "same" and stride > 1)
]


def output(module, columns):
    """`[n, out]`, a place after another, from the columns."""
    groups = columns.shape[0]
    weights = module.weight.detach().flatten(1).view(groups, -1, columns.shape[-1])
    out = torch.cat([c @ w.mT for c, w in zip(columns, weights, strict=True)], dim=1)
    return out + module.bias.detach()


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_columns_times_the_weight_are_the_output_of_a_convolution(kind):
    for options in CONVS:
        kernel, size = (3, (11,)) if kind is nn.Conv1d else ((3, 5), (9, 11))
        module = kind(4, 8, kernel, **options)
        for shape in ((3, 4, *size), (4, *size)):
            x = torch.randn(shape)
            columns = input_columns(module, x, "conv")
            assert columns.shape[0] == options["groups"] and columns.shape[2] == module.weight[0].numel()
            expected = module(x).detach()
            expected = expected[None] if len(shape) == len(size) + 1 else expected
            expected = expected.flatten(2).mT.reshape(-1, 8)  # sample after sample, place after place
            torch.testing.assert_close(output(module, columns), expected, rtol=1e-4, atol=1e-5, msg=str(options))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)},
        {"kernel_size": (5, 1), "padding": (3, 1), "padding_mode": "circular"},
        {"kernel_size": (1, 1), "stride": 2, "groups": 2},
        {"kernel_size": (4, 2), "padding": "same", "padding_mode": "reflect", "dilation": (1, 2)},
    ],
    ids=str,
)
def test_uneven_convolutions(options):
    module, x = nn.Conv2d(4, 6, **options), torch.randn(2, 4, 8, 9)
    expected = module(x).detach().flatten(2).mT.reshape(-1, 6)
    torch.testing.assert_close(output(module, input_columns(module, x, "conv")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6), (0, 6)])
def test_columns_of_a_linear_layer(shape):
    module, x = nn.Linear(6, 4), torch.randn(shape)
    columns = input_columns(module, x, "fc")
    assert columns.shape == (1, x.numel() // 6, 6)
    torch.testing.assert_close(output(module, columns), module(x).detach().view(-1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_columns_are_float32_and_without_a_graph(dtype):
    x = torch.randn(2, 4, 7, dtype=dtype, requires_grad=True)
    columns = input_columns(nn.Conv1d(4, 8, 3, dtype=dtype), x, "conv")
    assert columns.dtype == torch.float32 and not columns.requires_grad


def see(module, inputs, name="0.weight"):
    with collecting(nn.Sequential(module), {name: Int(4, rounding="gptq")}) as moments:
        for x in inputs:
            module(x)
    return moments[name].mean("layer")


def test_the_moment_is_the_mean_over_all_inputs():
    batches = [torch.randn(3, 6), torch.randn(2, 4, 6), torch.randn(6)]
    rows = torch.cat([batch.view(-1, 6) for batch in batches]).double()
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    moment = see(nn.Linear(6, 4), batches)
    assert moment.shape == (6, 6)
    torch.testing.assert_close(moment, expected.float())


def test_a_grouped_convolution_has_a_moment_a_group():
    module, x = nn.Conv2d(6, 9, 2, groups=3), torch.randn(4, 6, 5, 5)
    moments = see(module, [x[:1], x[1:]])
    assert moments.shape == (3, 8, 8)
    for g in range(3):
        alone = nn.Conv2d(2, 3, 2)
        torch.testing.assert_close(moments[g], see(alone, [x[:, 2 * g : 2 * g + 2]]))
    assert see(nn.Conv2d(6, 9, 2), [x]).shape == (24, 24)
    assert see(nn.Conv1d(6, 6, 1, groups=6), [x[:, :, 0]]).shape == (6, 1, 1)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
def test_attention_has_moments_of_its_inputs_and_of_what_it_makes_of_the_values(kind, by_name):
    module = attention(batch_first=True)
    model, arguments, seen = nn.Sequential(module), inputs(module, kind), []
    formula(
        *arguments, *parts_of(module), dict.fromkeys(["q", "k", "v", "out"], lambda x: seen.append(x) or x.double())
    )
    scheme = Int(4, rounding="gptq")
    with collecting(model, {"0.in_proj_weight": scheme, "0.out_proj.weight": scheme}) as moments:
        module(**dict(zip(("query", "key", "value"), arguments, strict=True))) if by_name else module(*arguments)
    assert "forward" not in vars(module)
    distinct = {id(x): x for x in arguments}.values()
    for name, rows in (
        ("in_proj_weight", torch.cat([x.flatten(0, 1) for x in distinct])),
        ("out_proj.weight", seen[-1]),
    ):
        rows = rows.reshape(-1, WIDTH).double()
        torch.testing.assert_close(moments[f"0.{name}"].mean(name), (rows.T @ rows / len(rows)).float())


class Normed(nn.MultiheadAttention):
    def forward(self, x):
        x = nn.functional.layer_norm(x, x.shape[-1:])
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize("name", ["0.in_proj_weight", "0.out_proj.weight"])
@pytest.mark.parametrize("is_class", [False, True])
def test_what_enters_attention_with_a_forward_of_its_own_is_not_guessed(name, is_class):
    module = Normed(WIDTH, 2) if is_class else nn.MultiheadAttention(WIDTH, 2)
    if not is_class:
        module.forward = lambda x: x
    forward = module.forward
    with pytest.raises(
        ValueError, match=rf"layer '{name}': rounding='gptq' knows no input of an attention with its own"
    ):
        see(module, [torch.ones(2, 3, WIDTH)], name)
    assert module.forward == forward and not module._forward_pre_hooks


def test_no_input_is_an_error_that_names_the_layer():
    for nothing in ([], [torch.empty(0, 6)]):
        with pytest.raises(ValueError, match="layer 'layer': no input has reached it"):
            see(nn.Linear(6, 4), nothing)


@pytest.mark.parametrize(
    "module", [nn.Conv3d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.Bilinear(2, 2, 2)]
)
def test_other_layers_are_refused_by_name(module):
    with pytest.raises(
        ValueError, match=rf"layer 'a\.b': .*Linear, attention, Conv1d and Conv2d, not {type(module).__name__}"
    ):
        input_columns(module, torch.randn(1, 2, 3, 3), "a.b")
