"""Where a run stands, and how it goes on: made of plain values, without a model."""

from dataclasses import replace

import pytest
from run_states import (
    JUDGE,
    assert_carries_the_same,
    at_audit,
    begun,
    fresh,
    result,
    run_to,
    statistics,
    with_audit,
)

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


def compared_with(state):
    """Step of the audit that the next one is compared with; 0 for the start."""
    return int((state.reference_of_subset.means - state.previous_of_subset.means).max())


@pytest.mark.parametrize("way", ["folder", "state dict"])
def test_a_resumed_run_is_compared_with_its_last_audit(way):
    interrupted = run_to(30)

    resumed = (
        fresh().resumed(interrupted.saved(), JUDGE)
        if way == "folder"
        else fresh().resumed_from_dict(interrupted.to_dict(), JUDGE)
    )

    assert [compared_with(state) for state in (interrupted, resumed, resumed.at_step(30))] == [30, 30, 30]
    # At 35 as well: nothing was audited since.
    assert compared_with(resumed.at_step(35)) == 30


@pytest.mark.parametrize("step", [0, 15, 20])
def test_a_run_that_goes_back_is_compared_with_no_later_audit(step):
    resumed = fresh().resumed_from_dict(run_to(30).to_dict(), JUDGE).at_step(step)

    assert resumed.last_audit is None
    assert compared_with(resumed) == 0
    assert resumed.trajectories.step_scores.shape[0] == 1 + step // 10


def test_a_failed_audit_is_not_compared_with():
    state = run_to(20)

    after = state.with_result(replace(result(state, 30), status="failed"), at_audit(state, 30))

    assert compared_with(after) == 20


def test_a_run_that_starts_over_is_compared_with_the_start():
    assert compared_with(run_to(20).restarted()) == 0


def test_a_chosen_subset_takes_its_part_of_the_audit_before():
    state = chosen(begun(chooses_subset=True))
    before = replace(state.last_audit.statistics, means=state.reference.means - 7)
    state = replace(state, last_audit=replace(state.last_audit, statistics=before))

    assert state.previous_of_subset.n_records == 30
    assert compared_with(state) == 7


def test_where_more_records_are_scored_than_at_the_audit_before_the_start_is_compared_with():
    state = with_audit(chosen(begun(chooses_subset=True)), 10)
    assert compared_with(state) == 10

    assert compared_with(replace(state, subset=state.subset.of_share(1.0))) == 0


def test_records_that_are_cut_since_are_compared_in_the_tokens_that_are_left():
    state = run_to(10)
    cut = replace(state, subset=replace(state.subset, cut_to=3))

    assert cut.previous_of_subset.n_tokens == cut.reference_of_subset.n_tokens == 2 * 60
    assert compared_with(cut) == 10
    # Whole again, the tokens that were cut have nothing to be compared with.
    shorter = with_audit(cut, 20)
    whole = replace(shorter, subset=replace(shorter.subset, cut_to=None))
    assert [compared_with(shorter), compared_with(whole)] == [20, 0]


def test_a_state_of_before_the_last_audit_was_kept_goes_on_from_the_start():
    state = {key: value for key, value in run_to(20).to_dict().items() if key != "last_audit"}

    assert compared_with(fresh().resumed_from_dict(state, JUDGE)) == 0


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
    """These audits have no other figure than the AUC, so that another budget finds nothing to judge."""
    interrupted = run_to(20)

    resumed = fresh().resumed(
        interrupted.saved(), Judge(LeakageBudget(metric="advantage", limit=0.5), 0.95, 4)
    )

    verdicts = [result.decision.is_within_budget for result in resumed.history]
    assert verdicts == [True, None, None]


def test_the_state_of_a_run_that_had_not_begun_changes_nothing():
    state = fresh()

    assert state.resumed_from_dict(fresh().to_dict(), JUDGE) is state
    assert state.saved() is None
