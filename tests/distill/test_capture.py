"""What is seen of a module's calls, and that nothing is left behind."""

import pytest
import torch
from torch import nn

from lightning_qnoise.distill.capture import Capture, Taps, has_gradient


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, scale=1.0):
        return self.b(self.a(x) * scale)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.act, self.head = Block(), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.act(self.body(x)))


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


X = torch.ones(2, 4)


def test_the_outermost_module_is_seen_with_arguments_and_output():
    model = Two()
    capture = Capture(model)
    with capture.recording() as calls:
        output = model.body(X, scale=2.0)
    assert [call.module for call in calls] == [model.body]
    assert calls[0].args[0] is X
    assert calls[0].kwargs == {"scale": 2.0}
    assert calls[0].output is output
    assert capture.the_module(calls) is model.body
    assert capture.target == "body"


def test_the_model_itself_hides_its_children():
    model = Two()
    with Capture(model).recording() as calls:
        model(X)
        model(X)
    assert [call.module for call in calls] == [model, model]


def test_after_the_first_step_only_the_module_found_is_looked_at():
    model = Two()
    capture = Capture(model)
    with capture.recording() as calls:
        model.body(X)
    capture.the_module(calls)
    with capture.recording() as calls:
        assert n_hooks(model) == 2
        model.head(model.body(X))
    assert [call.module for call in calls] == [model.body]


def test_two_children_are_refused_with_the_remedy():
    model = Two()
    capture = Capture(model)
    with capture.recording() as calls:
        model.head(model.body(X))
    with pytest.raises(ValueError, match=r"calls body, head, so it is not clear .* in Guidance\(target=...\)"):
        capture.the_module(calls)
    named = Capture(model, "head")
    with named.recording() as calls:
        model.head(model.body(X))
    assert named.the_module(calls) is model.head


def test_no_call_is_refused():
    for target, message in ((None, "does not call any module"), ("head", "does not call head")):
        capture = Capture(Two(), target)
        with pytest.raises(ValueError, match=message):
            capture.the_module([])


@pytest.mark.parametrize("target", ["heads", "body.c", "weight"])
def test_an_unknown_target_is_refused(target):
    with pytest.raises(ValueError, match=f"no module '{target}' to distill; its children are body, act, head"):
        Capture(Two(), target)


def test_a_target_may_be_the_model_a_grandchild_or_without_parameters():
    model = Two()
    for target in ("", "body.b", "act"):
        capture = Capture(model, target)
        with capture.recording() as calls:
            model(X)
        assert capture.the_module(calls) is model.get_submodule(target)
        assert capture.target == target


def test_a_shared_module_may_go_by_either_name():
    model = Two()
    model.again = model.head
    capture = Capture(model, "again")
    with capture.recording() as calls:
        model(X)
    assert capture.the_module(calls) is model.head
    assert capture.names[model.head] == "again"


def test_hooks_are_there_only_while_recording_and_those_of_others_stay():
    model, seen = Two(), []
    model.head.register_forward_hook(lambda *args: seen.append(1))
    capture, taps = Capture(model), Taps(model, ["head"], "student")
    assert n_hooks(model) == 1
    with pytest.raises(RuntimeError), capture.recording(), taps.recording():
        assert n_hooks(model) > 1
        model(torch.ones(2, 5))
    assert n_hooks(model) == 1
    with capture.recording() as calls, taps.recording():
        model(X)
    assert (n_hooks(model), len(calls), seen) == (1, 1, [1])


def test_a_forward_that_fails_and_is_tried_again():
    model = Two()
    with Capture(model).recording() as calls:
        for x in (torch.ones(2, 5), X):
            try:
                output = model(x)
            except RuntimeError:
                continue
    assert [call.output for call in calls] == [output]


def test_a_module_that_calls_itself():
    class Again(nn.Linear):
        def forward(self, x, depth=2):
            return self(super().forward(x), depth - 1) if depth else x

    model = Again(4, 4)
    with Capture(model).recording() as calls:
        output = model(X)
    assert [call.output for call in calls] == [output]


def test_recording_within_a_call_of_the_model_as_ddp_does():
    """DDP calls the module, whose forward is redirected to training_step for that call."""
    model, capture, seen = Two(), Capture(Two()), []
    capture = Capture(model)
    real = model.forward

    def redirected(*args):
        model.forward = real
        with capture.recording() as calls:
            model(X)
        seen.extend(calls)

    model.forward = redirected
    model(X)
    assert [call.module for call in seen] == [model]


def test_taps_keep_every_call_of_the_named_modules():
    model = Two()
    with Taps(model, ["body.a", "act"], "student").recording() as seen:
        model(X)
        output = model.act(torch.ones(1))
    assert [len(outputs) for outputs in seen.values()] == [1, 2]
    assert seen["act"][1] is output
    model(X)
    assert len(seen["body.a"]) == 1
    with pytest.raises(ValueError, match="the teacher has no module 'x' to distill; its children are body"):
        Taps(model, ["act", "x"], "teacher")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.ones(1, requires_grad=True), True),
        (torch.ones(1), False),
        ({"logits": torch.ones(1, requires_grad=True), "n": None}, True),
        ((torch.ones(1), 3), False),
        (object(), True),
    ],
)
def test_has_gradient(output, expected):
    assert has_gradient(output) is expected
