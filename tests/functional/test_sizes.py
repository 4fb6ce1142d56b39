import math

import pytest

from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.budget import LeakageBudget, check_resolvable
from ezmia_callbacks.functional.intervals import n_non_members_needed
from ezmia_callbacks.functional.sizes import audit_reach, sizes_for, useful_sizes


@pytest.mark.parametrize("n_rows", [100, 101, 999, 4_321, 25_000, 10**9])
def test_at_most_a_tenth_is_held_out(n_rows):
    sizes = sizes_for(n_rows)

    assert 10 <= sizes.n_non_members <= n_rows / 10
    assert sizes.n_members <= 500
    assert sizes.n_non_members <= 1_000


def test_no_more_are_chosen_than_can_be_drawn():
    for n_drawable in range(20, 400):
        sizes = sizes_for(1_000, n_drawable=n_drawable)

        assert min(sizes) >= 10
        assert sum(sizes) <= n_drawable


@pytest.mark.parametrize(("n_rows", "error"), [(0, ConfigurationError), (99, TooFewCanariesError)])
def test_too_few_rows_are_refused(n_rows, error):
    with pytest.raises(error, match=f"Got {n_rows} rows"):
        sizes_for(n_rows)


def test_the_fewest_useful_sizes_find_plain_leakage_and_fewer_do_not():
    sizes = useful_sizes(120, 120)

    assert audit_reach(*sizes).is_useful
    assert not audit_reach(sizes.n_members - 2, sizes.n_non_members - 1).is_useful


# 1 - (1 - fpr)^n at the piece of the error rate that the threshold has: the certificate, solved for fpr.
@pytest.mark.parametrize("n_non_members", [10, 100, 1_000])
def test_the_smallest_rate_is_one_that_its_non_members_just_certify(n_non_members):
    reach = audit_reach(500, n_non_members, n_audits=3)
    piece = 0.05 / 3 / 2 / 4 / 2

    assert n_non_members_needed(fpr=reach.fpr * 1.0001, failure_probability=piece) == n_non_members
    assert n_non_members_needed(fpr=reach.fpr * 0.9999, failure_probability=piece) == n_non_members + 1
    counts = {"n_members": 500, "n_non_members": n_non_members, "n_scores": 4}
    budget = LeakageBudget(metric="tpr_at_fpr", fpr=reach.fpr * 1.0001, limit=0.9)
    check_resolvable(budget, **counts, failure_probability=0.05 / 3)
    too_low = LeakageBudget(metric="tpr_at_fpr", fpr=reach.fpr * 0.9999, limit=0.9)
    with pytest.raises(TooFewCanariesError):
        check_resolvable(too_low, **counts, failure_probability=0.05 / 3)


def test_more_canaries_find_less_and_more_audits_find_more_alone():
    few, many = audit_reach(100, 50), audit_reach(400, 200)
    often = audit_reach(100, 50, n_audits=10)

    assert 0.5 < many.auc < few.auc < often.auc < 1.0
    assert many.fpr < few.fpr < often.fpr
    assert audit_reach(100, 50, score="ez").auc < few.auc


def test_what_cannot_be_found_is_said_to_be_unfindable():
    reach = audit_reach(10, 10, n_audits=100, confidence=0.999)

    assert (reach.auc, reach.is_useful) == (None, False)
    assert "each of 100 audits finds no leakage, however large, with 80 % probability" in reach.describe()
    assert math.isclose(reach.fpr, 1.0 - (0.001 / 100 / 16) ** (1 / 10))
