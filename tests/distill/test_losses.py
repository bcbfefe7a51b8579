"""The teacher's part of a loss, against NumPy and finite differences."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_qnoise.distill import Guidance, soft_targets


def kl(student, teacher, temperature):
    """Mean over the rows of sum_c q log(q / p), times the square of the temperature, in float64."""

    def probabilities(logits):
        z = logits.double().numpy().reshape(-1, logits.shape[-1]) / temperature
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    p, q = probabilities(student), probabilities(teacher)
    return float((q * np.log(q / p)).sum(axis=1).mean() * temperature**2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.3])
@pytest.mark.parametrize("shape", [(5,), (1, 2), (7, 3), (4, 1, 9), (2, 3, 5, 11), (3, 5000)])
def test_soft_targets_are_the_kl_divergence_of_the_teacher_from_the_student(shape, temperature):
    student, teacher = 3 * torch.randn(shape), 3 * torch.randn(shape)
    assert soft_targets(student, teacher, temperature).item() == pytest.approx(kl(student, teacher, temperature), 1e-5)
    assert soft_targets(teacher, student, temperature).item() == pytest.approx(kl(teacher, student, temperature), 1e-5)


def test_no_divergence_from_itself_and_none_from_a_shift():
    logits = torch.randn(6, 4)
    assert soft_targets(logits, logits).item() == 0.0
    assert soft_targets(logits, logits + 5.0, 2.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_fp32(dtype):
    student, teacher = torch.randn(8, 10).to(dtype), torch.randn(8, 10).to(dtype)
    got = soft_targets(student, teacher, 2.0)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(kl(student, teacher, 2.0), 1e-5)
    assert soft_targets(student, teacher.float(), 2.0) == got


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = soft_targets(student, torch.tensor([[-1e4, 1e4, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_by_finite_differences(temperature):
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    soft_targets(student, teacher, temperature).backward()
    for index in np.ndindex(3, 5):
        ends = []
        for h in (1e-4, -1e-4):
            moved = student.detach().double()
            moved[index] += h
            ends.append(kl(moved, teacher, temperature))
        assert student.grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-5)


def test_the_scale_of_the_gradient_does_not_depend_on_the_temperature():
    """For small logits it is (student - teacher) / (rows * classes) at every temperature (Hinton et al., eq. 4)."""
    student, teacher = 1e-2 * torch.randn(4, 6), 1e-2 * torch.randn(4, 6)
    student -= student.mean(dim=1, keepdim=True)
    teacher -= teacher.mean(dim=1, keepdim=True)
    for temperature in (2.0, 20.0):
        leaf = student.clone().requires_grad_()
        soft_targets(leaf, teacher, temperature).backward()
        torch.testing.assert_close(leaf.grad, (student - teacher) / 24, rtol=0.03, atol=1e-6)


def test_no_rows_are_no_loss():
    student = torch.zeros(0, 4, requires_grad=True)
    loss = soft_targets(student, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.shape == (0, 4)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (4, 0)])
def test_fewer_than_two_classes_are_refused(shape):
    with pytest.raises(ValueError, match="two classes or more in the last dimension"):
        soft_targets(torch.zeros(shape), torch.zeros(shape))


def test_shapes_that_differ_are_refused_and_not_broadcast():
    with pytest.raises(ValueError, match=r"have shape \[4, 3\], the teacher's \[1, 3\]; pass a loss of your own"):
        soft_targets(torch.zeros(4, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: {"logits": x, "n": 3}, lambda x: SimpleNamespace(logits=x)])
def test_logits_are_found(kind):
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    assert Guidance(temperature=2.0).compare(kind(student), kind(teacher)) == soft_targets(student, teacher, 2.0)


@pytest.mark.parametrize("output", [(torch.zeros(2, 3),), {"scores": torch.zeros(2, 3)}, SimpleNamespace(logits=None)])
def test_no_logits(output):
    with pytest.raises(TypeError, match=r"without logits; pass Guidance\(loss=...\)"):
        Guidance().compare(output, output)


def test_a_loss_of_ones_own():
    guidance = Guidance(loss=lambda s, t: F.mse_loss(s[0], t[0]))
    assert guidance.compare((torch.ones(2), 1), (torch.zeros(2), 1)).item() == 1.0


@pytest.mark.parametrize(("value", "what"), [(1.0, "float"), (torch.ones(3), r"shape \[3\]"), (None, "NoneType")])
def test_a_loss_that_is_not_0_dim_is_refused(value, what):
    with pytest.raises(ValueError, match=rf"Guidance\(loss=...\) must return a 0-dim tensor, got {what}"):
        Guidance(loss=lambda s, t: value).compare(1, 1)
    with pytest.raises(ValueError, match=rf"the loss of features\['a'\] must return a 0-dim tensor, got {what}"):
        Guidance(features={"a": ("b", lambda s, t: value)}).compare_features({"a": [1]}, {"b": [1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
        ({"alpha": math.nan}, r"alpha must lie in \[0, 1\], got nan"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": math.inf}, "temperature must be positive, got inf"),
        ({"dtype": "int8"}, "dtype must be float16, bfloat16, float32 or None, got 'int8'"),
        ({"feature_weight": -1.0}, "feature_weight must not be negative, got -1.0"),
        ({"outputs": False}, "nothing to compare"),
        ({"features": {"a": 3}}, r"features\['a'\] must be the name of a module or \(name, loss\), got 3"),
        ({"features": {"a": ("b",)}}, r"features\['a'\] must be the name"),
        ({"features": {"a": ("b", "mse")}}, r"features\['a'\] must be the name"),
        ({"features": {"a": ("b", None)}}, r"features\['a'\] must be the name"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


def test_features_are_compared_pair_by_pair_and_call_by_call():
    a, b, c, d = (torch.randn(2, 3) for _ in range(4))
    guidance = Guidance(features={"x": "u", "y": ("v", lambda s, t: (s - t).abs().sum())})
    first, second = guidance.compare_features({"x": [a, b], "y": [c]}, {"u": [c, d], "v": [d]})
    expected = (np.square((a - c).numpy()).mean() + np.square((b - d).numpy()).mean()) / 2
    assert first.item() == pytest.approx(float(expected), 1e-6)
    assert second.item() == pytest.approx(float(np.abs((c - d).numpy()).sum()), 1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            [torch.zeros(2, 3)],
            [torch.zeros(2, 4)],
            r"'x' of the student returns shape \[2, 3\], 'u' of the teacher \[2",
        ),
        ([torch.zeros(2, 3)], [torch.zeros(3)], r"pass features=\{'x': \('u', loss\)\} with a loss"),
        ([(torch.zeros(2),)], [torch.zeros(2)], "'x' of the student returns a tuple, 'u' of the teacher a Tensor"),
        (
            [torch.zeros(2)] * 2,
            [torch.zeros(2)],
            r"features\['x'\]: the student's module gave 2 outputs .* teacher's 1",
        ),
        ([], [], r"features\['x'\]: the student's module gave 0 outputs"),
    ],
)
def test_features_that_cannot_be_compared(student, teacher, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Guidance(features={"x": "u"}).compare_features({"x": student}, {"u": teacher})
