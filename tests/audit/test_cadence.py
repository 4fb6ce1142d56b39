"""When audits come, from plain numbers; runs are in the tests of the callbacks."""

import pytest

from ezmia_callbacks.audit.cadence import early_steps, ends_epochs, plan_audits


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [(100, {12, 25, 50}), (80, {10, 20, 40}), (8, {1, 2, 4}), (3, {1, 2}), (2, {1}), (1, {1})],
)
def test_the_first_epoch_is_looked_at_after_an_eighth_a_quarter_and_half(n_steps, expected):
    assert early_steps("auto", n_steps=n_steps) == expected


@pytest.mark.parametrize("n_steps", range(1, 50))
def test_early_steps_are_steps_of_the_first_epoch(n_steps):
    assert early_steps("auto", n_steps=n_steps) <= set(range(1, n_steps + 1))


@pytest.mark.parametrize("every", ["epoch", 5, 0.25])
def test_no_other_cadence_has_early_steps(every):
    assert early_steps(every, n_steps=100) == frozenset()


def test_an_epoch_of_unknown_length_has_no_early_steps():
    assert early_steps("auto", n_steps=None) == frozenset()


@pytest.mark.parametrize(("every", "expected"), [("auto", True), ("epoch", True), (5, False), (0.5, False)])
def test_epochs_end_with_an_audit_by_name_alone(every, expected):
    assert ends_epochs(every) is expected


@pytest.mark.parametrize(
    ("steps", "intervals", "n_steps", "expected"),
    [
        ([], [], 30, (30,)),
        ([1, 2, 5], [10], 30, (1, 2, 5, 10, 20, 30)),
        ([1, 2, 5], [5, 10], 30, (1, 2, 5, 10, 15, 20, 25, 30)),
        ([], [7, 10], 30, (7, 10, 14, 20, 21, 28, 30)),
        ([1], [10], 1, (1,)),
    ],
)
def test_every_step_is_planned_once_and_the_last_always(steps, intervals, n_steps, expected):
    plan = plan_audits(steps, intervals, n_steps=n_steps, steps_per_epoch=10)

    assert plan.steps == expected
    assert plan.n_audits == len(expected)


@pytest.mark.parametrize(
    ("intervals", "n_steps", "expected"), [([None, 7], 20, (2, 7, 14, 20)), ([7], None, (2, 7))]
)
def test_what_has_no_known_length_is_planned_as_far_as_it_is_known(intervals, n_steps, expected):
    plan = plan_audits([2], intervals, n_steps=n_steps, steps_per_epoch=None)

    assert plan.steps == expected
    assert plan.n_audits is None
