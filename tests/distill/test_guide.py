"""A guided training step against the same loss written by hand."""

from copy import deepcopy
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qnoise import PQ, quantize
from lightning_qnoise.distill import Guidance, Guide, Rehearsal, soft_targets


class Student(nn.Module):
    """`how` picks one of several kinds of training steps."""

    def __init__(self, how="self", width=8, reentrant=False):
        super().__init__()
        self.fc, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.how, self.reentrant = how, reentrant

    def forward(self, x):
        if self.how == "checkpointed":
            return self.head(checkpoint(self._hidden, x, use_reentrant=self.reentrant))
        logits = self.head(self._hidden(x))
        return {"logits": logits} if self.how == "mapping" else (logits, None) if self.how == "tuple" else logits

    def _hidden(self, x):
        return F.relu(self.fc(x))

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        if self.how == "none":
            return None
        if self.how == "children":
            return F.cross_entropy(self.head(self.fc(x)), y)
        if self.how == "peek":
            with torch.no_grad():
                x = x + 0 * self(x).sum()
        if self.how == "twice":
            return F.cross_entropy(self(x), y) + F.cross_entropy(self(-x), y)
        if self.how == "whole checkpointed":
            output = checkpoint(self, x, use_reentrant=self.reentrant)
        else:
            output = self(x)
        logits = {"mapping": lambda: output["logits"], "tuple": lambda: output[0]}.get(self.how, lambda: output)()
        loss = F.cross_entropy(logits, y)
        return {"loss": loss, "extra": 1} if self.how == "dict" else loss


X, Y = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 0, 1])
X = X.requires_grad_()  # reentrant checkpointing wants an input with a gradient


def pair(how="self", **options):
    torch.manual_seed(0)
    return Student(how, **options), Student(how)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def by_hand(student, teacher, alpha=0.5, temperature=1.0):
    logits = student.head(F.relu(student.fc(X)))
    part = soft_targets(logits, teacher.head(F.relu(teacher.fc(X))).detach(), temperature)
    return (1 - alpha) * F.cross_entropy(logits, Y) + alpha * part, part.detach()


@pytest.mark.parametrize("how", ["self", "dict", "mapping", "peek", "checkpointed", "whole checkpointed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_loss_and_its_gradient(how, reentrant):
    student, teacher = pair(how, reentrant=reentrant)
    guide = Guide(student, teacher, Guidance(alpha=0.3, temperature=2.0))
    result = student.training_step((X, Y), batch_idx=0)
    loss = result["loss"] if how == "dict" else result
    assert how != "dict" or result["extra"] == 1
    expected, part = by_hand(student, teacher, 0.3, 2.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(guide.last, part)
    loss.backward()
    want = gradients(student, expected)
    torch.testing.assert_close([p.grad for p in student.parameters()], list(want))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert guide.last.grad_fn is None
    guide.detach()
    assert "training_step" not in vars(student)


def test_a_custom_loss_on_tuples():
    student, teacher = pair("tuple")
    Guide(student, teacher, Guidance(alpha=1.0, loss=lambda s, t: F.mse_loss(s[0], t[0])))
    with torch.no_grad():
        expected = F.mse_loss(student(X)[0], teacher(X)[0])
    torch.testing.assert_close(student.training_step((X, Y)), expected)


def test_every_call_of_the_target_counts():
    student, teacher = pair("twice")
    guide = Guide(student, teacher, Guidance(alpha=1.0, features={"fc": "fc"}, feature_weight=0.1))
    loss = student.training_step((X, Y))
    with torch.no_grad():
        parts = [soft_targets(student(x), teacher(x)) for x in (X, -X)]
        hints = [F.mse_loss(student.fc(x), teacher.fc(x)) for x in (X, -X)]
    torch.testing.assert_close(loss, sum(parts) / 2 + 0.1 * sum(hints) / 2)
    guide.detach()


def test_a_child_is_found_or_named():
    student, teacher = pair("children")
    Guide(student, teacher, Guidance())
    with pytest.raises(ValueError, match=r"calls fc, head, .* Guidance\(target=...\)"):
        student.training_step((X, Y))
    student, teacher = pair("children")
    Guide(student, teacher, Guidance(alpha=1.0, target="head"))
    hidden = student.fc(X)
    expected = soft_targets(student.head(hidden), teacher.head(hidden))
    torch.testing.assert_close(student.training_step((X, Y)), expected)


def test_a_teacher_of_another_kind_takes_the_place_of_the_target():
    student, _ = pair()
    teacher = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 3))
    Guide(student, teacher, Guidance(alpha=1.0), whole=False)
    assert not teacher[1].training
    with torch.no_grad():
        expected = soft_targets(student(X), teacher(X))
    torch.testing.assert_close(student.training_step((X, Y)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_teacher_in_half_precision(dtype):
    student, teacher = pair()
    half = deepcopy(teacher).to(getattr(torch, dtype))
    Guide(student, teacher, Guidance(alpha=1.0, dtype=dtype))
    assert teacher.fc.weight.dtype == getattr(torch, dtype)
    with torch.no_grad():
        expected = soft_targets(student(X), half(X.to(half.fc.weight.dtype)))
    assert torch.equal(student.training_step((X, Y)), expected)


def test_inputs_follow_the_teachers_dtype_and_integers_do_not():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, ids, scale):
            return self.fc(self.table(ids) * scale)

        def training_step(self, batch):
            return self(batch, scale=torch.ones(1, dtype=self.fc.weight.dtype)).logsumexp(-1).mean()

    student = Words().bfloat16()
    guide = Guide(student, Words(), Guidance())
    student.training_step(torch.tensor([[1, 2], [3, 4]])).backward()
    assert guide.last.isfinite()


def test_a_packed_teacher():
    student, teacher = pair()
    quantize(teacher, PQ(block_size=2, n_centroids=4))
    Guide(student, teacher, Guidance(alpha=1.0))
    with torch.no_grad():
        expected = soft_targets(student(X), teacher(X))
    torch.testing.assert_close(student.training_step((X, Y)), expected)


def test_features_alone_and_with_outputs():
    student, teacher = pair()
    wide = Student(width=16)
    with torch.no_grad():
        hint = F.mse_loss(student.fc(X), teacher.fc(X))
        part = soft_targets(student(X), teacher(X))
        sums = (student.fc(X).sum(1) - wide.fc(X).sum(1)).square().mean()
    cases = [
        (teacher, {"features": {"fc": "fc"}, "feature_weight": 2.0}, part + 2 * hint),
        (teacher, {"features": {"fc": "fc"}, "outputs": False}, hint),
        (
            wide,
            {"features": {"fc": ("fc", lambda s, t: (s.sum(1) - t.sum(1)).square().mean())}, "outputs": False},
            sums,
        ),
    ]
    for model, options, expected in cases:
        guide = Guide(student, model, Guidance(alpha=1.0, **options))
        loss = student.training_step((X, Y))
        torch.testing.assert_close(loss, expected)
        assert gradients(student, loss)[0].abs().sum() > 0
        guide.detach()


def test_features_that_do_not_fit_name_the_modules():
    student, teacher = pair()
    for features, message in (
        ({"fd": "fc"}, "the student has no module 'fd' to distill; its children are fc, head"),
        ({"fc": "fd"}, "the teacher has no module 'fd' to distill; its children are fc, head"),
    ):
        with pytest.raises(ValueError, match=message):
            Guide(student, teacher, Guidance(features=features))
        assert "training_step" not in vars(student)
    Guide(student, Student(width=16), Guidance(features={"fc": "fc"}))
    with pytest.raises(ValueError, match=r"'fc' of the student returns shape \[5, 8\], 'fc' of the teacher \[5, 16\]"):
        student.training_step((X, Y))


def test_features_without_a_gradient_are_refused():
    student, teacher = pair("checkpointed", reentrant=True)
    guide = Guide(student, teacher, Guidance(features={"fc": "fc"}))
    with pytest.raises(ValueError, match=r"gave 0 outputs with a gradient in this step.*reentrant"):
        student.training_step((X, Y))
    guide.detach()
    student, teacher = pair("checkpointed", reentrant=False)
    Guide(student, teacher, Guidance(alpha=1.0, features={"fc": "fc"}, outputs=False))
    student.training_step((X, Y)).backward()
    torch.testing.assert_close(
        student.fc.weight.grad, gradients(student, F.mse_loss(student.fc(X), teacher.fc(X).detach()))[0]
    )


def test_a_frozen_student_is_refused():
    student, teacher = pair()
    student.requires_grad_(False)
    Guide(student, teacher, Guidance())
    with pytest.raises(ValueError, match="the outputs of 'the model' have no gradient in training_step"):
        student.training_step((X.detach(), Y))


def test_a_step_without_loss():
    student, teacher = pair("none")
    guide = Guide(student, teacher, Guidance())
    assert student.training_step((X, Y)) is None
    assert guide.last is None
    student.how = "self"
    student.training_step((X, Y))
    assert guide.last is not None
    student.how = "none"
    student.training_step((X, Y))
    assert guide.last is None


@pytest.mark.parametrize("value", [1.0, {"log": 1}, (torch.ones(1),)])
def test_a_result_without_a_loss_is_refused(value):
    student, teacher = pair()
    student.training_step = lambda batch: value
    Guide(student, teacher, Guidance())
    with pytest.raises(ValueError, match="needs a training_step that returns a loss"):
        student.training_step((X, Y))


def test_nothing_happens_without_gradients_or_while_inactive():
    student, teacher = pair()
    plain = student.training_step((X, Y))
    guide = Guide(student, teacher, Guidance())
    with torch.no_grad():
        assert torch.equal(student.training_step((X, Y)), plain)
    guide.is_active = False
    assert torch.equal(student.training_step((X, Y)), plain)
    guide.is_active = True
    assert not torch.equal(student.training_step((X, Y)), plain)


def test_calls_outside_of_training_step_reach_no_teacher():
    student, teacher = pair()
    calls = []
    teacher.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    Guide(student, teacher, Guidance())
    student(X)
    with torch.no_grad():
        student.eval()(X)
    assert calls == []
    student.train().training_step((X, Y))
    assert calls == [False]  # one, without gradients


def test_state_dict_parameters_and_copies_know_nothing_of_the_teacher():
    student, teacher = pair()
    keys, parameters = list(student.state_dict()), list(student.parameters())
    Guide(student, teacher, Guidance(features={"fc": "fc"}))
    student.training_step((X, Y))
    assert list(student.state_dict()) == keys
    assert all(a is b for a, b in zip(student.parameters(), parameters, strict=True))
    copied = deepcopy(student)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in copied.modules())


def test_an_exception_in_the_step_leaves_the_guide_usable():
    student, teacher = pair()
    guide = Guide(student, teacher, Guidance())
    with pytest.raises(RuntimeError):
        student.training_step((torch.ones(5, 7), Y))
    loss = student.training_step((X, Y))
    torch.testing.assert_close(loss, by_hand(student, teacher)[0])
    guide.detach()


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("has_own", [False, True])
def test_guides_are_stacked_and_detached_in_any_order(order, has_own):
    student, teacher = pair()
    if has_own:
        student.training_step = student.training_step
    own = vars(student).get("training_step")
    plain = student.training_step((X, Y))
    guides = [Guide(student, teacher, Guidance(alpha=0.5)) for _ in range(3)]
    part = by_hand(student, teacher)[1]
    torch.testing.assert_close(student.training_step((X, Y)), plain / 8 + part * 7 / 8)
    for index, n_left in zip(order, (2, 1, 0), strict=True):
        guides[index].detach()
        guides[index].detach()
        share = 0.5**n_left
        torch.testing.assert_close(student.training_step((X, Y)), plain * share + part * (1 - share))
    assert vars(student).get("training_step") is own


def test_a_wrapper_of_someone_else_above_stays():
    student, teacher = pair()
    plain = student.training_step((X, Y))
    guide = Guide(student, teacher, Guidance())
    inner = student.training_step
    student.training_step = lambda *args: 2 * inner(*args)
    guide.detach()
    torch.testing.assert_close(student.training_step((X, Y)), 2 * plain)


def test_a_rehearsal_watches_one_step_and_changes_nothing():
    student, _ = pair()
    plain = student.training_step((X, Y))
    rehearsal = Rehearsal(student, Guidance(features={"fc": "fc"}))
    with torch.no_grad():
        student.training_step((X, Y))
    assert not rehearsal.is_over
    assert torch.equal(student.training_step((X, Y)), plain)
    assert rehearsal.is_over
    assert "training_step" not in vars(student)
    assert all(parameter.requires_grad for parameter in student.parameters())
    rehearsal.detach()


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("children", {}, "calls fc, head"),
        ("tuple", {}, r"a tuple without logits; pass Guidance\(loss=...\)"),
        ("self", {"target": "heads"}, "no module 'heads'"),
        ("self", {"features": {"fc": "fd"}}, "no module 'fd'"),
        ("self", {"features": {"fc": "head"}}, r"returns shape \[5, 8\], 'head' of the teacher \[5, 3\]"),
    ],
)
def test_a_rehearsal_finds_what_a_guide_would(how, options, message):
    student, teacher = pair(how)
    for make in (lambda g: Rehearsal(student, g), lambda g: Guide(student, teacher, g)):
        with pytest.raises((ValueError, TypeError), match=message):
            made = make(Guidance(**options))
            try:
                student.training_step((X, Y))
            finally:
                made.detach()
        assert "training_step" not in vars(student)
