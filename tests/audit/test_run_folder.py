"""The files of a run, without a model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from run_states import CHECK, JUDGE, assert_carries_the_same, begun, fresh, run_to

from ezmia_callbacks.audit.run_folder import RunFolder
from ezmia_callbacks.errors import ReferenceMismatchError
from ezmia_callbacks.results.result import Measurement


def written(path, state):
    folder = RunFolder(path)
    folder.save_reference(state)
    folder.save_audits(state)
    return folder


def load(folder, results, state, *, run_id=""):
    return folder.load(results, state, run_id=run_id)


def resumed(saved):
    """Under the same budget: what judged the audits comes with them, from the checkpoint."""
    return fresh().resumed(replace(saved, judged_by=begun().history.judged_by), JUDGE)


def test_what_is_written_comes_back(tmp_path):
    interrupted = run_to(20)
    folder = written(tmp_path / "run", interrupted)

    saved = load(folder, interrupted.history.results, fresh())

    assert_carries_the_same(resumed(saved), interrupted)


def test_the_audits_are_those_of_the_checkpoint_not_of_the_folder(tmp_path):
    folder = written(tmp_path, run_to(20))

    saved = load(folder, run_to(10).history.results, fresh())

    assert len(saved.results) == 2
    assert_carries_the_same(resumed(saved).at_step(10), run_to(10))


def test_a_lost_history_is_named_and_costs_the_findings_alone(tmp_path, caplog):
    folder = written(tmp_path, run_to(10))
    (tmp_path / "history.jsonl").unlink()

    saved = load(folder, run_to(10).history.results, fresh())

    assert "What an earlier part of the run found is lost" in caplog.text
    assert saved.findings == ()
    assert saved.reference is not None


def test_lost_trajectories_leave_the_findings(tmp_path, caplog):
    folder = written(tmp_path, run_to(10))
    (tmp_path / "trajectories.safetensors").write_bytes(b"damaged")

    saved = load(folder, run_to(10).history.results, fresh())

    assert "is not a file of audit trajectories" in caplog.text
    assert (saved.findings, saved.trajectories) == ((CHECK,), None)


def test_a_lost_reference_is_refused(tmp_path):
    folder = written(tmp_path, run_to(10))
    (tmp_path / "reference.safetensors").unlink()

    with pytest.raises(ReferenceMismatchError, match="the trained weights cannot stand in"):
        load(folder, [], fresh())


def test_the_reference_of_other_canaries_is_refused(tmp_path):
    folder = written(tmp_path, run_to(10))

    with pytest.raises(ReferenceMismatchError, match="belong to other canaries"):
        load(folder, [], fresh(seed=1))


def test_the_run_that_wrote_here_last_may_go_on(tmp_path):
    written(tmp_path, run_to(20)).refuse_another_run(run_to(10))
    RunFolder(tmp_path / "empty").refuse_another_run(run_to(10))


@pytest.mark.parametrize(
    "different", [{"member_loss": 3.25}, {"non_member_loss": 3.0}, {"metrics": {"auc": Measurement(0.51)}}]
)
def test_a_run_that_began_otherwise_than_the_one_here_is_refused(tmp_path, different):
    folder = written(tmp_path, run_to(20))
    state = run_to(10)
    baseline, *later = state.history.results
    history = replace(state.history, results=(replace(baseline, **different), *later))

    with pytest.raises(
        ReferenceMismatchError, match="are those of another run that began otherwise: pass the `output_dir`"
    ):
        folder.refuse_another_run(replace(state, history=history))


def test_no_reference_is_written_before_there_is_one(tmp_path):
    RunFolder(tmp_path).save_reference(fresh())

    assert list(tmp_path.iterdir()) == []


def test_the_history_file_says_whether_it_is_whole(tmp_path):
    written(tmp_path, fresh().resumed(begun().saved(), JUDGE))

    first_line = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])

    assert first_line["is_complete"] is False


def test_kept_and_rejected_weights_have_a_folder_each(tmp_path):
    folder = RunFolder(tmp_path)

    assert folder.kept_weights == tmp_path / "last_within_budget"
    assert folder.rejected_weights == tmp_path / "over_budget"


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(OSError, match="pass an `output_dir` that is writable"):
        RunFolder(tmp_path / "file" / "run").check_writable()


def test_scores_of_the_records_are_written_whole(tmp_path):
    state = run_to(20)
    folder = written(tmp_path, state)

    saved = load(folder, state.history.results, fresh())

    np.testing.assert_equal(saved.trajectories.scores, state.trajectories.scores)


def test_the_last_audit_comes_back_with_its_step(tmp_path):
    state = run_to(20)
    folder = written(tmp_path, state)

    saved = load(folder, state.history.results, fresh())

    assert saved.last_audit.step == 20
    np.testing.assert_array_equal(saved.last_audit.statistics.means, state.last_audit.statistics.means)


def test_the_last_audit_of_another_step_is_left_alone(tmp_path):
    folder = written(tmp_path, run_to(20))

    assert load(folder, run_to(10).history.results, fresh()).last_audit is None


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_a_lost_last_audit_costs_nothing_else(tmp_path, content):
    state = run_to(20)
    folder = written(tmp_path, state)
    path = tmp_path / "last_audit.safetensors"
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    saved = load(folder, state.history.results, fresh())

    assert saved.last_audit is None
    assert resumed(saved).trajectories.n_audits == 3
