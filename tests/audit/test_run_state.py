"""Where a run stands, and how it goes on: made of plain values, without a model."""

from dataclasses import replace

import pytest
from run_states import JUDGE, assert_carries_the_same, begun, fresh, result, run_to, statistics

from ezmia_callbacks import LeakageBudget
from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.errors import ConfigurationError, ReferenceMismatchError


def test_an_audit_makes_another_state_and_leaves_the_old_one_alone():
    before = begun()

    after = before.with_result(result(before, 10))

    assert [len(before.history), len(after.history)] == [1, 2]
    assert [before.trajectories.n_audits, after.trajectories.n_audits] == [1, 2]


@pytest.mark.parametrize("way", ["folder", "state dict"])
def test_a_resumed_run_has_all_that_the_interrupted_one_had(way):
    interrupted = run_to(30)

    resumed = (
        fresh(command="second.py").resumed(interrupted.saved(), JUDGE)
        if way == "folder"
        else fresh(command="second.py").resumed_from_dict(interrupted.to_dict(), JUDGE)
    )

    assert_carries_the_same(resumed, interrupted)
    assert resumed.is_resumed
    # Settings and surroundings are those of the run that goes on.
    assert resumed.history.run_metadata.command == "second.py"
    assert resumed.history.is_complete is False


def test_a_run_resumed_at_a_step_has_no_audits_of_its_future():
    resumed = fresh().resumed(run_to(30).saved(), JUDGE).at_step(15)

    assert_carries_the_same(resumed, run_to(10))


def test_a_resumed_run_can_still_go_back_to_an_earlier_step():
    resumed = fresh().resumed_from_dict(run_to(30).to_dict(), JUDGE)

    assert_carries_the_same(resumed.at_step(10), run_to(10))


def test_a_restarted_run_keeps_reference_checks_and_baseline():
    interrupted = run_to(30)

    restarted = interrupted.restarted()

    assert_carries_the_same(restarted, begun())
    assert restarted.reference is interrupted.reference
    assert not restarted.is_resumed


def chosen(state, share=0.5):
    return state.with_subset(state.subset.of_share(share))


def test_a_chosen_subset_is_that_of_the_run_from_its_start():
    state = run_to(20, chosen(begun(chooses_subset=True)))

    assert state.is_subset_chosen
    assert state.trajectories.record_ids == state.subset.encoded.record_ids
    assert len(state.trajectories.record_ids) == 30
    assert state.reference.n_records == 60
    assert state.reference_of_subset.n_records == 30


def test_a_resumed_run_keeps_the_subset_that_was_chosen():
    interrupted = run_to(20, chosen(begun(chooses_subset=True)))

    resumed = fresh(chooses_subset=True).resumed_from_dict(interrupted.to_dict(), JUDGE)

    assert_carries_the_same(resumed, interrupted)
    assert resumed.is_subset_chosen


def test_a_run_resumed_from_before_the_choice_chooses_again():
    interrupted = run_to(20, chosen(begun(chooses_subset=True)))

    resumed = fresh(chooses_subset=True).resumed(interrupted.saved(), JUDGE).at_step(5)

    assert not resumed.is_subset_chosen
    assert resumed.subset.share == 1.0
    # The scores of the others are gone.
    assert resumed.trajectories.n_audits == 0


def test_the_state_of_other_canaries_is_refused():
    with pytest.raises(ReferenceMismatchError, match="belongs to other canaries or another reference"):
        fresh(seed=1).resumed_from_dict(run_to(10).to_dict(), JUDGE)


def test_the_state_of_pairs_does_not_go_on_without_them():
    """Nor the other way around; a fingerprint can be copied."""
    interrupted = run_to(10)
    of_pairs = replace(interrupted, reference=replace(statistics(60), rejected=statistics(60)))

    with pytest.raises(ConfigurationError, match="has rejected sides, and these canaries have none"):
        fresh().resumed_from_dict(of_pairs.to_dict(), JUDGE)


@pytest.mark.parametrize("scores", [None, [], {}, {"ez": [0.5]}])
def test_trajectories_of_a_state_are_read_as_what_they_are_or_refused(scores):
    state = run_to(10).to_dict()
    state["trajectories"]["scores"] = scores

    with pytest.raises(ConfigurationError):
        fresh().resumed_from_dict(state, JUDGE)


def test_trajectories_of_a_state_of_the_first_version_are_lost_and_nothing_else_is():
    interrupted = run_to(10)
    state = interrupted.to_dict()
    state["trajectories"]["scores"] = state["trajectories"]["scores"]["ez"]

    resumed = fresh().resumed_from_dict(state, JUDGE)

    assert resumed.trajectories.n_audits == 0
    assert resumed.history.results == interrupted.history.results


def test_a_run_of_another_score_is_refused():
    state = run_to(10)
    others = replace(
        state,
        history=replace(
            state.history, results=tuple(replace(result, score="wbc") for result in state.history)
        ),
    )

    with pytest.raises(ConfigurationError, match="judged by the score 'wbc', and this one would be by 'ez'"):
        fresh().resumed(others.saved(), JUDGE)


def test_a_run_resumed_under_another_budget_is_judged_anew():
    """These audits have no figures, so that another budget finds nothing to judge."""
    interrupted = run_to(20)

    resumed = fresh().resumed(interrupted.saved(), Judge(LeakageBudget(limit=0.55), 0.95, 4))

    verdicts = [result.decision.is_within_budget for result in resumed.history]
    assert verdicts == [True, None, None]


def test_the_state_of_a_run_that_had_not_begun_changes_nothing():
    state = fresh()

    assert state.resumed_from_dict(fresh().to_dict(), JUDGE) is state
    assert state.saved() is None
