"""Schedules against values worked out by hand."""

import math
import pickle

import pytest

from lightning_qnoise import ConstantRate, CosineRate, LinearRate, StepRate, WarmupCosine
from lightning_qnoise.schedules import RateSchedule, check_rate

SCHEDULES = [
    ConstantRate(0.3),
    LinearRate(0.0, 0.5),
    LinearRate(0.8, 0.2, begin=0.25, finish=0.75),
    CosineRate(0.1, 0.9),
    CosineRate(1.0, 0.0, begin=0.5),
    StepRate([0.0, 0.1, 0.5], [0.5, 0.9]),
    StepRate([0.2], []),
]
FACTORS = [WarmupCosine(), WarmupCosine(0.0), WarmupCosine(0.25)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


@pytest.mark.parametrize(
    ("schedule", "progress", "rate"),
    [
        (ConstantRate(0.3), 0.0, 0.3),
        (ConstantRate(0.3), 1.0, 0.3),
        (LinearRate(0.0, 0.5), 0.2, 0.1),
        (LinearRate(0.0, 0.5), 1.0, 0.5),
        (LinearRate(0.8, 0.2, begin=0.25, finish=0.75), 0.1, 0.8),
        (LinearRate(0.8, 0.2, begin=0.25, finish=0.75), 0.375, 0.65),
        (LinearRate(0.8, 0.2, begin=0.25, finish=0.75), 0.9, 0.2),
        (CosineRate(0.0, 1.0), 0.25, 0.5 - math.sqrt(2) / 4),
        (CosineRate(0.0, 1.0), 0.5, 0.5),
        (CosineRate(0.0, 1.0), 1 / 3, 0.25),
        (CosineRate(0.4, 0.2), 1.0, 0.2),
        (CosineRate(0.0, 1.0, begin=0.5), 0.75, 0.5),
        (StepRate([0.0, 0.1, 0.5], [0.5, 0.9]), 0.4999, 0.0),
        (StepRate([0.0, 0.1, 0.5], [0.5, 0.9]), 0.5, 0.1),
        (StepRate([0.0, 0.1, 0.5], [0.5, 0.9]), 0.9, 0.5),
        (StepRate([0.3, 0.1], [0.0]), 0.0, 0.1),
        (StepRate([0.3, 0.1], [1.0]), 1.0, 0.1),
        (WarmupCosine(0.1), 0.0, 0.0),
        (WarmupCosine(0.1), 0.025, 0.25),
        (WarmupCosine(0.1), 0.1, 1.0),
        (WarmupCosine(0.1), 0.55, 0.5),
        (WarmupCosine(0.1), 1.0, 0.0),
        (WarmupCosine(0.25), 0.5, 0.75),
        (WarmupCosine(0.0), 0.0, 1.0),
        (WarmupCosine(0.0), 0.25, 0.5 + math.sqrt(2) / 4),
    ],
)
def test_values(schedule, progress, rate):
    assert schedule(progress) == pytest.approx(rate, abs=1e-12)


@each_schedule
def test_rates_stay_in_bounds_also_beyond_the_ends(schedule):
    for i in range(-10, 111):
        assert 0 <= schedule(i / 100) <= 1


@pytest.mark.parametrize("schedule", FACTORS, ids=repr)
def test_a_factor_rises_to_one_at_the_end_of_the_warmup_and_falls_to_zero(schedule):
    values = [schedule(i / 100) for i in range(101)]
    top = round(100 * schedule.warmup)
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert max(values) == values[top] == 1
    assert min(values) == values[100] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES + FACTORS, ids=repr)
def test_schedules_pickle_compare_print_and_cannot_be_changed(schedule):
    twin = pickle.loads(pickle.dumps(schedule))
    assert twin == schedule
    assert twin is not schedule
    assert eval(repr(schedule)) == schedule
    assert isinstance(schedule, RateSchedule)
    with pytest.raises(AttributeError):
        schedule.rate = 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantRate(1.1), r"rate must lie in \[0, 1\], got 1.1"),
        (lambda: ConstantRate(-0.1), r"rate must lie in \[0, 1\], got -0.1"),
        (lambda: ConstantRate(math.nan), r"rate must lie in \[0, 1\], got nan"),
        (lambda: LinearRate(start=-1), r"start must lie in \[0, 1\]"),
        (lambda: LinearRate(end=2), r"end must lie in \[0, 1\]"),
        (lambda: CosineRate(end=math.nan), r"end must lie in \[0, 1\], got nan"),
        (lambda: LinearRate(begin=0.5, finish=0.5), "expected 0 <= begin < finish <= 1"),
        (lambda: LinearRate(begin=math.nan), "expected 0 <= begin < finish <= 1"),
        (lambda: CosineRate(finish=1.5), "expected 0 <= begin < finish <= 1"),
        (lambda: WarmupCosine(1.0), r"warmup must lie in \[0, 1\), got 1.0"),
        (lambda: WarmupCosine(-0.1), r"warmup must lie in \[0, 1\), got -0.1"),
        (lambda: WarmupCosine(math.nan), r"warmup must lie in \[0, 1\), got nan"),
        (lambda: StepRate([0.1], [0.5]), "one rate more than milestones"),
        (lambda: StepRate([], []), "one rate more than milestones"),
        (lambda: StepRate([0.1, 7.0], [0.5]), r"rate must lie in \[0, 1\], got 7.0"),
        (lambda: StepRate([0.1, 0.2, 0.3], [0.9, 0.5]), "milestones must increase"),
        (lambda: StepRate([0.1, 0.2, 0.3], [0.5, 0.5]), "milestones must increase"),
        (lambda: StepRate([0.1, 0.2], [1.5]), r"milestones must increase within \[0, 1\]"),
        (lambda: StepRate([0.1, 0.2], [math.nan]), "milestones must increase"),
    ],
)
def test_a_wrong_argument_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_check_rate_names_what_it_checks():
    assert check_rate(1) == 1
    with pytest.raises(ValueError, match="dropout must lie"):
        check_rate(2, "dropout")
