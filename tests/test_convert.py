import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_qnoise import PQ, Int, dequantize, quantize
from lightning_qnoise.attach import attach
from lightning_qnoise.convert import check_finite, dense_state_dict, encode_weights
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import PackedWeight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x)))) + self.offset


def snapshot(model):
    """All that could change: classes, objects and values."""
    return (
        [(name, type(module), id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()],
        [(name, id(b), b.clone()) for name, b in model.named_buffers()],
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[0] == before[0]
    for old, new in zip(before[1] + before[2], after[1] + after[2], strict=True):
        assert old[:2] == new[:2]
        assert torch.equal(
            old[2].view(torch.uint8) if old[2].dim() else old[2], new[2].view(torch.uint8) if new[2].dim() else new[2]
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("policy", ["int8", "ipq", {"*": PQ(1, 4)}, Int(4)])
def test_nan_and_inf_are_refused_and_nothing_is_changed(value, policy):
    model = Net()
    with torch.no_grad():
        model.head.weight[1, 2:4] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 'head\.weight': 2 of 64 values are NaN or Inf.*learning rate"):
        quantize(model, policy)
    assert_untouched(model, before)


@pytest.mark.parametrize("policy", [{"*": Int(4), "nothing": Int(4)}, {"head": PQ(5, 4)}, {"head": PQ(4, 4, n_iter=1)}])
def test_nothing_is_changed_by_a_policy_that_does_not_fit(policy):
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6  # overflows a float16 codebook, seen only while encoding
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"nothing|cannot cut rows|layer 'head\.weight': weights up to 1e\+06 overflow"
    ):
        quantize(model, policy)
    assert_untouched(model, before)


def test_encode_changes_nothing():
    model = Net()
    before = snapshot(model)
    packed = encode_weights(dict(model.named_parameters()), {"head.weight": Int(4)})
    assert_untouched(model, before)
    assert list(packed) == ["head.weight"] and isinstance(packed["head.weight"], PackedWeight)


def test_only_what_is_selected_is_packed():
    model = Net()
    others = {n: id(p) for n, p in model.named_parameters() if n != "head.weight"}
    assert quantize(model, {"head": Int(4)}) is model
    assert [name for name, _ in packed_weights(model)] == ["head.weight"]
    assert {n: id(p) for n, p in model.named_parameters()} == others


def test_output_is_that_of_the_decoded_weights():
    model = Net().eval()
    expected = copy.deepcopy(model)
    quantize(model, {"stem": PQ(9, 8), "*": Int(4)})
    with torch.no_grad():
        for name, weight in packed_weights(model):
            expected.get_parameter(name).copy_(weight.decode())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), expected(x))
    dequantize(model)
    assert torch.equal(model(x), expected(x))
    assert list(model.state_dict()) == list(expected.state_dict())


def test_dequantize_is_the_inverse_where_quantization_is_exact():
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint_like(p, -8, 8))
    before = copy.deepcopy(model.state_dict())
    dequantize(quantize(model, {"*": PQ(1, 16)}))
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    dequantize(model)  # of a float model: nothing to do


def test_quantizing_again_takes_what_is_left_or_raises():
    model = quantize(Net(), {"head": Int(4)})
    head = model.head._modules["weight"]
    quantize(model, "int8")
    assert model.head._modules["weight"] is head  # stays as it is
    assert [w.scheme.bits for _, w in packed_weights(model)] == [8, 8, 4]
    with pytest.raises(ValueError, match="selects no weight of the model"):
        quantize(model, "int8")
    with pytest.raises(ValueError, match=r"'head' in the policy matches no layer weight, only head\.bias"):
        quantize(model, {"head": Int(8)})


def test_two_weights_of_one_module_one_after_the_other():
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    names = list(attention.state_dict())
    quantize(attention, {"v_proj_weight": Int(4)})
    quantize(attention, {"q_proj_weight": Int(8), "k_proj_weight": None})
    assert [n for n, _ in packed_weights(attention)] == ["q_proj_weight", "v_proj_weight"]
    assert list(dense_state_dict(attention)) == names
    assert list(dequantize(attention).state_dict()) == names


def test_dense_state_dict_is_of_the_float_model_too():
    model = Net()
    state = dense_state_dict(model)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    quantize(model, "int8")
    assert all(torch.equal(state[k], v) for k, v in dense_state_dict(model).items() if not k.endswith("weight"))


def test_extra_state_keeps_its_place():
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"count": 3}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(Counting(8, 8), nn.Linear(8, 8))
    names = list(model.state_dict())
    assert list(dense_state_dict(quantize(model, "int8"))) == names


def test_noise_is_taken_off_first():
    model = Net()
    attach(model, {"head.weight": Int(4)})
    quantize(model, {"head": Int(4)})
    assert type(model.head).__name__ == "PackedLinear" and isinstance(model.head, nn.Linear)
    assert not any("Noisy" in type(m).__name__ for m in dequantize(model).modules())


def test_parametrized_layers_are_left_alone_by_presets():
    model = nn.Sequential(weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64))
    quantize(model, "int8")
    assert [name for name, _ in packed_weights(model)] == ["1.weight"]


def test_low_precision_and_frozen_models():
    model = Net().bfloat16().requires_grad_(False)
    quantize(model, "int4")
    assert all(w.decode().dtype == torch.bfloat16 for _, w in packed_weights(model))
    assert model.eval()(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


def test_check_finite():
    check_finite("x", torch.ones(3))
    with pytest.raises(ValueError, match="layer 'x': 1 of 3"):
        check_finite("x", torch.tensor([1.0, torch.nan, 2.0]))
