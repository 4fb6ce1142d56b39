import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from own_loop import draw, run, train_one_epoch
from tiny import make_model, make_rows, make_texts, make_tokenizer

from ezmia_callbacks import (
    AuditHistory,
    AuditResult,
    CanarySet,
    LeakageBudget,
    PrivacyAuditor,
    insert_canaries,
)
from ezmia_callbacks.errors import (
    AuditError,
    AuditMemoryError,
    ConfigurationError,
    NonFiniteLogitsError,
    ReferenceMismatchError,
    TooFewCanariesError,
    UnsupportedModelError,
)
from ezmia_callbacks.results import Trajectories
from ezmia_callbacks.scoring.statistics import SCORES


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, expected):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_memorizing_run_is_stopped_and_its_last_good_weights_come_back(tmp_path, in_memory):
    rows, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(
        canaries, budget=LeakageBudget(limit=0.6), n_audits=30, output_dir=None if in_memory else tmp_path
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    kept = weights(model)
    for _ in range(30):
        train_one_epoch(model, rows, optimizer)
        result = auditor.audit(model)
        if result.decision.stop:
            break
        kept = weights(model)

    restored = auditor.restore_within_budget(model)

    assert result.decision.stop
    assert result.metrics["auc"].band.lower > 0.6
    assert restored.decision.is_within_budget
    assert restored is auditor.history.last_within_budget
    assert_same_weights(model, kept)


def test_a_run_that_goes_on_regardless_reads_as_total_leakage():
    """Past the point where every token is learned the released score falls to 0; ours must not."""
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, n_audits=60)

    run(auditor, rows, n_epochs=60)

    # When that point is reached, and how smooth the way is, depends on the processor.
    last = max(auditor.history, key=lambda result: result.member_edges.n_no_errors)
    n_learned, n_members = last.member_edges.n_no_errors, last.member_edges.n_records
    assert n_learned >= 3
    # Members that score 0 would lose to every non-member.
    assert last.metrics["auc"].value > 1 - n_learned / n_members


def test_without_training_every_audit_reads_chance_and_never_stops():
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.6), n_audits=5)

    run(auditor, rows, learning_rate=0.0, n_epochs=5)

    assert [result.metrics["auc"].value for result in auditor.history] == [0.5] * 6
    assert auditor.history.stopped is None
    assert all(result.metrics["advantage"].value == 0.0 for result in auditor.history)


def test_the_band_is_wider_than_the_interval_of_one_audit():
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, n_audits=4)

    run(auditor, rows, n_epochs=1)

    measured = auditor.history[-1].metrics["auc"]
    # Both are divided among the four scores that are judged.
    assert measured.interval.confidence == pytest.approx(1 - 0.05 / 4)
    assert measured.band.confidence == pytest.approx(1 - 0.05 / 4 / 4)
    assert measured.band.lower < measured.interval.lower < measured.value
    assert measured.value < measured.interval.upper < measured.band.upper


def test_the_history_file_holds_every_audit(tmp_path):
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, n_audits=2, output_dir=tmp_path)

    run(auditor, rows, n_epochs=2)

    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[0]["schema"] == 1
    assert lines[1:] == auditor.history.to_dicts()


def test_auditing_before_begin_is_refused():
    _, canaries = draw()

    with pytest.raises(ConfigurationError, match="must be called before the first optimizer step"):
        PrivacyAuditor(canaries).audit(make_model())


def test_a_budget_beyond_the_canaries_is_refused_when_built():
    _, canaries = draw()

    with pytest.raises(TooFewCanariesError, match="needs at least 574 non-members, got 60"):
        PrivacyAuditor(
            canaries, budget=LeakageBudget(metric="tpr_at_fpr", limit=0.1), n_audits=1, confidence=0.95
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "magic"}, "Unknown score 'magic': use 'strongest', one of ez"),
        ({"confidence": 1.0}, "`confidence` must lie in"),
        ({"fpr_levels": (0.0,)}, "`fpr_levels` must lie in"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"on_error": "ignore"}, "`on_error` must be"),
        ({"budget": 0.6}, "must be a LeakageBudget"),
        ({"n_audits": 0}, "`n_audits` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_when_built(arguments, message):
    _, canaries = draw()

    with pytest.raises(ConfigurationError, match=message):
        PrivacyAuditor(canaries, **arguments)


def test_a_model_that_cannot_be_audited_is_refused_before_training():
    _, canaries = draw()

    with pytest.raises(UnsupportedModelError, match="returned no logits"):
        PrivacyAuditor(canaries).begin(make_model().transformer)


def diverge(model):
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))


def test_nan_logits_mark_the_audit_as_failed_and_never_as_zero(caplog):
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.6), n_audits=2)
    auditor.begin(model)
    diverge(model)

    result = auditor.audit(model)

    assert result.status == "failed"
    assert "NaN or infinite" in result.error
    assert result.metrics == {}
    assert result.to_metrics() == {"failed": 1.0}
    assert result.decision.is_within_budget is None
    assert "leakage unknown" in result.describe()
    assert "failed; training goes on" in caplog.text


def test_errors_can_be_raised_and_are_still_in_the_history():
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, on_error="raise")
    auditor.begin(model)
    diverge(model)

    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
        auditor.audit(model)

    assert auditor.history.n_failed == 1


def test_nan_logits_at_the_baseline_are_always_raised():
    _, canaries = draw()
    model = make_model()
    diverge(model)

    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
        PrivacyAuditor(canaries, on_error="warn").begin(model)


def test_a_failed_audit_keeps_the_weights_of_the_last_good_one():
    rows, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.8), n_audits=2)
    auditor.begin(model)
    train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-3))
    auditor.audit(model)
    good = weights(model)
    diverge(model)
    auditor.audit(model)

    auditor.restore_within_budget(model)

    assert_same_weights(model, good)


def test_sides_that_differ_before_training_are_reported(caplog):
    members = make_rows(make_texts(60, n_words=12))
    non_members = [{"input_ids": [row["input_ids"][0]] * 12} for row in make_rows(make_texts(200, seed=5))]
    model = make_model(seed=3)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)

    auditor = PrivacyAuditor(CanarySet.from_lists(members, non_members))
    auditor.begin(model)

    assert "can be told apart without the model (AUC at least 0.867 by words)" in caplog.text
    assert "can be told apart" in auditor.history.caveat
    assert {f.name for f in auditor.history.findings if f.is_flagged} >= {
        "words",
        "mean loss before training",
    }


def test_a_budget_is_not_judged_on_a_shifted_split_of_the_users(caplog):
    members = make_rows(make_texts(60, n_words=12))
    non_members = make_rows([f"{text} the the the" for text in make_texts(60, seed=5)])
    canaries = CanarySet.from_lists(members, non_members)
    budget = LeakageBudget(limit=0.6)

    with pytest.raises(ConfigurationError, match="allow_shift=True"):
        PrivacyAuditor(canaries, budget=budget, n_audits=1).begin(make_model())

    auditor = PrivacyAuditor(canaries, budget=budget, n_audits=1, allow_shift=True)
    auditor.begin(make_model())
    assert "can be told apart without the model" in auditor.history.caveat
    assert auditor.history.caveat in caplog.text


def test_near_copies_of_non_members_in_training_are_found_before_the_first_step():
    rows, canaries = draw()
    copied = [r for r, is_member in zip(canaries.records, canaries.is_member, strict=True) if not is_member]
    auditor = PrivacyAuditor(canaries, training_records=[*rows, *copied[:5]])

    auditor.begin(make_model())

    found = {finding.name: finding for finding in auditor.history.findings}
    assert found["near copies among training rows"].is_flagged
    assert "5 of 60 non-members" in found["near copies among training rows"].text
    assert "near copies" in auditor.history.caveat


def test_findings_survive_a_resume(tmp_path):
    _, canaries = draw()
    first = PrivacyAuditor(canaries, output_dir=tmp_path)
    model = make_model()
    first.begin(model)

    second = PrivacyAuditor(canaries, output_dir=tmp_path)
    second.resume(model, first.history.to_dicts(), step=0)

    assert second.history.findings == first.history.findings
    assert second.history.caveat == first.history.caveat


def test_an_attacked_run_of_inserted_canaries_has_an_epsilon_and_a_curve_for_each_tier():
    rows, canaries = insert_canaries(
        make_rows(make_texts(1500)), n_canaries=200, repetitions=(1, 8), length=12, max_fraction=0.9, seed=0
    )
    auditor = PrivacyAuditor(canaries, n_audits=2)
    run(auditor, rows, n_epochs=2)
    result = auditor.history[-1]

    assert auditor.history[0].epsilon is None
    assert result.n_members + result.n_non_members == 100
    assert result.auc_by_group["x8"].value > result.auc_by_group["x1"].value
    assert result.auc_by_group["x1"].value == result.metrics["auc"].value
    assert result.epsilon.n == 40
    assert result.to_metrics()["epsilon_lower"] == result.epsilon.value
    assert AuditResult.from_dict(json.loads(json.dumps(result.to_dict()))) == replace(
        result, scores=None, scores_beside={}
    )


def test_a_resumed_run_has_the_original_reference_and_history(tmp_path):
    rows, canaries = draw()
    first = PrivacyAuditor(canaries, n_audits=3, output_dir=tmp_path)
    model = run(first, rows, n_epochs=2)

    second = PrivacyAuditor(canaries, n_audits=3, output_dir=tmp_path)
    second.resume(model, first.history.to_dicts(), step=2)
    train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    result = second.audit(model)

    np.testing.assert_array_equal(second.reference.log_probs, first.reference.log_probs)
    assert [r.step for r in second.history] == [0, 1, 2, 3]
    assert result.metrics["auc"].value > 0.5


def test_resuming_without_the_reference_is_refused_with_the_way_out(tmp_path):
    _, canaries = draw()

    with pytest.raises(ReferenceMismatchError, match="the trained weights cannot stand in"):
        PrivacyAuditor(canaries, output_dir=tmp_path).resume(make_model(), [], step=3)


def test_resuming_with_other_canaries_is_refused(tmp_path):
    _, canaries = draw()
    PrivacyAuditor(canaries, output_dir=tmp_path).begin(make_model())
    _, others = draw(seed=1)

    with pytest.raises(ReferenceMismatchError, match="belong to other canaries"):
        PrivacyAuditor(others, output_dir=tmp_path).resume(make_model(), [], step=3)


def test_restoring_without_a_budget_is_refused():
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries)
    auditor.begin(model)

    with pytest.raises(AuditError, match="that needs a `budget`"):
        auditor.restore_within_budget(model)


def test_finish_removes_the_kept_weights_and_nothing_else(tmp_path):
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.8), n_audits=1, output_dir=tmp_path)
    run(auditor, rows, n_epochs=1)
    assert list((tmp_path / "last_within_budget").glob("*.safetensors"))

    auditor.finish()

    left = [
        ".lock",
        "history.jsonl",
        "last_audit.safetensors",
        "reference.safetensors",
        "trajectories.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_history_is_whole_once_the_run_has_said_that_it_ended(tmp_path):
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, n_audits=2, output_dir=tmp_path)
    told = [auditor.history.is_complete]

    model = run(auditor, rows, n_epochs=1)
    told += [auditor.history.is_complete, AuditHistory.load(tmp_path / "history.jsonl").is_complete]
    auditor.finish()
    told += [auditor.history.is_complete, AuditHistory.load(tmp_path / "history.jsonl").is_complete]
    auditor.audit(model)
    told += [auditor.history.is_complete, AuditHistory.load(tmp_path / "history.jsonl").is_complete]

    assert told == [None, False, False, True, True, False, False]


def test_finishing_waits_for_no_other_process(tmp_path, monkeypatch):
    """A script may finish on its main process alone."""
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.8), n_audits=1, output_dir=tmp_path)
    run(auditor, rows, n_epochs=1)

    def wait(*arguments, **options):
        raise AssertionError("a collective operation")

    for name in ("on_all_ranks", "broadcast_from_main", "gather"):
        monkeypatch.setattr(f"ezmia_callbacks.audit.auditor.{name}", wait)

    auditor.finish()

    assert AuditHistory.load(tmp_path / "history.jsonl").is_complete


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_full_disk_at_the_end_loses_no_run(tmp_path, monkeypatch, caplog, on_error):
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, n_audits=1, output_dir=tmp_path, on_error=on_error)
    run(auditor, rows, n_epochs=1)

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("ezmia_callbacks.results.history.write_atomically", full)

    auditor.finish()

    assert "could not be written: No space left on device" in caplog.text
    assert auditor.history.is_complete


def test_a_point_without_an_audit_is_a_gap(tmp_path):
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.6), n_audits=2, output_dir=tmp_path)
    run(auditor, rows, n_epochs=1)

    result = auditor.mark_failed("OSError: the checkpoint is damaged", step=2, epoch=2.0)

    assert (result.status, result.decision.is_within_budget, result.metrics) == ("failed", None, {})
    assert AuditHistory.load(tmp_path / "history.jsonl")[-1].error == "OSError: the checkpoint is damaged"


def test_an_auditor_that_only_judges_never_stops():
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.51, rule="point"), judge_only=True)

    run(auditor, rows, n_epochs=4)

    assert [result.decision.is_within_budget for result in auditor.history][-1] is False
    assert not any(result.decision.stop for result in auditor.history)
    assert len(auditor.history) == 5


def test_auditing_after_a_state_was_loaded_needs_the_model_first():
    rows, canaries = draw()
    first = PrivacyAuditor(canaries, n_audits=2)
    model = run(first, rows, n_epochs=1)
    second = PrivacyAuditor(canaries, n_audits=2)
    second.load_state_dict(first.state_dict())

    with pytest.raises(ConfigurationError, match=r"`begin\(model\)` must be called"):
        second.audit(model)


def test_an_unwritable_history_does_not_end_training(tmp_path, caplog, monkeypatch):
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, n_audits=1, output_dir=tmp_path)
    auditor.begin(model)

    def full(*_args):
        raise OSError("No space left on device")

    monkeypatch.setattr("ezmia_callbacks.results.history.append", full)
    result = auditor.audit(model)

    assert result.status == "ok"
    assert "history could not be written: No space left" in caplog.text


def test_patience_needs_that_many_audits_over_budget():
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.6, patience=2), n_audits=30)

    run(auditor, rows, n_epochs=30)

    over = [result for result in auditor.history if result.decision.is_within_budget is False]
    assert [result.decision.n_over_in_a_row for result in over[-3:]] == [1, 2, 3]
    assert auditor.history.stopped is over[-1]


@pytest.mark.parametrize("score", sorted(SCORES.keys() - {"margin"}))
def test_every_score_can_decide(score):
    rows, canaries = draw()
    auditor = PrivacyAuditor(
        canaries,
        budget=LeakageBudget(limit=0.6),
        score=score,
        n_audits=30,
        tokenizer=make_tokenizer(),
        restore=False,
    )

    run(auditor, rows, n_epochs=30)

    assert auditor.history[-1].score == score
    assert auditor.history[-1].metrics["auc"].value > 0.6


def test_weights_that_could_not_be_kept_are_not_claimed_to_be_back(tmp_path, caplog, monkeypatch):
    rows, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.8), n_audits=2, output_dir=tmp_path)
    auditor.begin(model)
    start = weights(model)

    def full(*_args, **_options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ezmia_callbacks.audit.kept_weights.write_tensors", full)
        train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-3))
        auditor.audit(model)
        auditor.state_dict()  # waits for the write

    restored = auditor.restore_within_budget(model)

    assert "Weights could not be kept (No space left on device)" in caplog.text
    assert restored.is_baseline
    assert_same_weights(model, start)


def test_weights_kept_after_the_checkpoint_are_forgotten_on_resume(tmp_path):
    rows, canaries = draw()
    budget = LeakageBudget(limit=0.8)
    first = PrivacyAuditor(canaries, budget=budget, n_audits=3, output_dir=tmp_path)
    model = make_model()
    first.begin(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train_one_epoch(model, rows, optimizer)
    first.audit(model)
    checkpoint = weights(model)
    train_one_epoch(model, rows, optimizer)
    first.audit(model)

    resumed = make_model()
    resumed.load_state_dict(checkpoint)
    second = PrivacyAuditor(canaries, budget=budget, n_audits=3, output_dir=tmp_path)
    second.resume(resumed, first.history.to_dicts(), step=1)
    train_one_epoch(resumed, rows, torch.optim.Adam(resumed.parameters(), lr=1e-2))
    restored = second.restore_within_budget(resumed)

    assert restored.step == 1
    assert_same_weights(resumed, checkpoint)


@pytest.mark.parametrize("epoch", [float("nan"), float("inf")])
def test_an_epoch_that_is_not_a_number_is_refused(epoch):
    _, canaries = draw()
    auditor = PrivacyAuditor(canaries)

    with pytest.raises(ConfigurationError, match="`epoch` must be a finite number"):
        auditor.begin(make_model(), epoch=epoch)


def test_the_budget_brings_its_own_confidence():
    rows, canaries = draw()
    auditor = PrivacyAuditor(
        canaries, budget=LeakageBudget(limit=0.6, confidence=0.8), n_audits=2, restore=False
    )

    run(auditor, rows, n_epochs=1)

    measured = auditor.history[-1].metrics["auc"]
    assert measured.interval.confidence == pytest.approx(1 - 0.05 / 4)
    assert measured.band.confidence == pytest.approx(1 - 0.1 / 4)


def test_the_baseline_decides_nothing_and_has_no_band():
    _, canaries = draw()

    baseline = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.6)).begin(make_model())

    assert all(measured.band is None for measured in baseline.metrics.values())
    assert not baseline.decision.stop


def through_a_checkpoint(state, folder):
    """As Accelerate and Lightning do it: only tensors and plain Python come back."""
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("to_disk", [True, False])
def test_a_run_resumed_from_its_state_goes_on_as_if_nothing_had_happened(tmp_path, to_disk):
    rows, canaries = draw()
    whole = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.8), n_audits=3)
    model = make_model()
    run(whole, rows, n_epochs=3, model=model)

    first = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.8), n_audits=3)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first.begin(model)
    train_one_epoch(model, rows, optimizer)
    first.audit(model, epoch=1)
    state = through_a_checkpoint(first.state_dict(), tmp_path)
    second = PrivacyAuditor(
        canaries, budget=LeakageBudget(limit=0.8), n_audits=3, output_dir=tmp_path if to_disk else None
    )
    second.load_state_dict(state)
    assert second.begin(model).step == 1
    for epoch in (2, 3):
        train_one_epoch(model, rows, optimizer)
        second.audit(model, epoch=epoch)

    resumed, expected = (
        [{**row, "seconds": 0, "overhead": None} for row in a.history.to_dicts()] for a in (second, whole)
    )
    assert resumed == expected
    np.testing.assert_equal(second.trajectories.scores, whole.trajectories.scores)
    assert second.trajectories.steps.tolist() == [0, 1, 2, 3]
    assert (tmp_path / "reference.safetensors").exists() == to_disk


def test_weights_of_the_last_audit_are_kept_on_resume_and_later_ones_are_not(tmp_path, caplog):
    rows, canaries = draw()
    budget = LeakageBudget(limit=0.99, rule="point")
    first = PrivacyAuditor(canaries, budget=budget, n_audits=3)
    model = run(first, rows, n_epochs=1)
    audited = weights(model)
    state = through_a_checkpoint(first.state_dict(), tmp_path)

    second = PrivacyAuditor(canaries, budget=budget, n_audits=3)
    second.load_state_dict(state)
    second.begin(model)
    train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    assert second.restore_within_budget(model).step == 1
    assert_same_weights(model, audited)
    assert "No weights" not in caplog.text

    train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    third = PrivacyAuditor(canaries, budget=budget, n_audits=3)
    third.load_state_dict(state)
    third.begin(model)
    assert "No weights within the budget are kept yet" in caplog.text
    with pytest.raises(AuditError, match="no weights to restore"):
        third.restore_within_budget(model)


def test_the_state_of_other_canaries_is_refused(tmp_path):
    _, canaries = draw()
    first = PrivacyAuditor(canaries)
    first.begin(make_model())

    with pytest.raises(ReferenceMismatchError, match="belongs to other canaries"):
        PrivacyAuditor(draw(seed=1)[1]).load_state_dict(first.state_dict())


def test_the_state_of_a_run_that_never_began_starts_a_run():
    _, canaries = draw()
    second = PrivacyAuditor(canaries)
    second.load_state_dict(PrivacyAuditor(canaries).state_dict())

    assert second.begin(make_model()).is_baseline


def test_a_data_parallel_wrapper_is_looked_into():
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, n_audits=1)

    assert auditor.begin(torch.nn.DataParallel(model)).status == "ok"


def test_a_second_model_that_does_not_fit_is_named_and_not_taken_for_a_large_batch():
    _, canaries = draw()

    def load():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(AuditMemoryError, match="no memory for a second model") as caught:
        PrivacyAuditor(canaries, reference=load).begin(make_model())
    assert caught.value.__cause__ is None


def test_a_tpr_budget_needs_to_know_the_number_of_audits():
    _, canaries = draw()
    budget = LeakageBudget(metric="tpr_at_fpr", fpr=0.1, limit=0.5)

    with pytest.raises(ConfigurationError, match="pass `n_audits`"):
        PrivacyAuditor(canaries, budget=budget)


def test_a_run_that_goes_beyond_what_its_canaries_can_judge_is_stopped():
    _, canaries = draw()
    budget = LeakageBudget(metric="tpr_at_fpr", fpr=0.1, limit=0.99, rule="point")
    model = make_model()
    auditor = PrivacyAuditor(canaries, budget=budget, n_audits=1, assume_seen=True)
    auditor.begin(model)
    assert not auditor.audit(model).decision.stop

    for _ in range(40):
        decision = auditor.audit(model).decision
        if decision.stop:
            break

    assert decision.stop
    assert decision.is_within_budget is None
    assert "cannot be judged any more" in decision.message
    assert auditor.restore_within_budget(model).decision.is_within_budget


@pytest.mark.parametrize("budget", [None, LeakageBudget(limit=0.8)])
def test_a_model_that_is_left_with_other_weights_than_any_audits_is_named(caplog, budget):
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=budget, n_audits=2)
    model = run(auditor, rows, n_epochs=2)
    assert auditor.audit_of(model) is auditor.history[-1]
    auditor.finish(model)
    assert "any audit" not in caplog.text

    with torch.no_grad():
        model.transformer.wte.weight.mul_(0.5)
    auditor.finish(model)

    assert auditor.audit_of(model) is None
    assert "does not hold the weights of any audit: its leakage is unknown" in caplog.text
    assert ("OVER BUDGET" in caplog.text) is (budget is not None)


def test_steps_that_fall_are_refused_before_anything_is_measured():
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries)
    auditor.begin(model)
    auditor.audit(model, step=10)

    for again in (lambda: auditor.audit(model, step=9), lambda: auditor.mark_failed("no", step=9)):
        with pytest.raises(ConfigurationError, match="Got step 9 after the audit of step 10"):
            again()

    assert [result.step for result in auditor.history] == [0, 10]
    auditor.audit(model, step=10)


@pytest.mark.parametrize("state", [None, [], {}, {"reference": None}, {1: 2}, "state"])
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(ConfigurationError):
        PrivacyAuditor(draw()[1]).load_state_dict(state)


def test_a_state_of_another_number_of_canaries_is_refused():
    _, canaries = draw()
    auditor = PrivacyAuditor(canaries)
    auditor.begin(make_model())
    state = auditor.state_dict()
    exposures = {name: v[:-1] if isinstance(v, list) else v for name, v in state["exposures"].items()}

    with pytest.raises(ConfigurationError, match="exposures of the interrupted run cover"):
        PrivacyAuditor(canaries).load_state_dict({**state, "exposures": exposures})


def bytes_written(folder, write):
    """Bytes that came into each file of a folder: all of a new one, and what an old one has grown by."""

    def state():
        return {path.name: path.stat() for path in folder.iterdir() if path.is_file()}

    before = state()
    write()
    return {
        name: now.st_size
        - (before[name].st_size if name in before and before[name].st_ino == now.st_ino else 0)
        for name, now in state().items()
        if name not in before or (now.st_ino, now.st_size) != (before[name].st_ino, before[name].st_size)
    }


def test_an_audit_more_is_appended_to_the_history_however_many_there_are(tmp_path):
    _, canaries = draw()
    auditor = PrivacyAuditor(canaries, output_dir=tmp_path)
    auditor.begin(make_model())

    written = [
        bytes_written(tmp_path, lambda step=step: auditor.mark_failed("no memory", step=step))[
            "history.jsonl"
        ]
        for step in range(1, 41)
    ]

    # A step, and what the audits cost, have more digits later.
    assert max(written) < 1.1 * written[0]
    assert AuditHistory.load(tmp_path / "history.jsonl") == auditor.history


def test_the_scores_of_a_full_block_of_audits_are_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ezmia_callbacks.results.trajectory_blocks.N_AUDITS_OF_BLOCK", 3)
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, output_dir=tmp_path)
    auditor.begin(model)

    written = [bytes_written(tmp_path, lambda: auditor.audit(model)) for _ in range(10)]

    of_scores = [{n: size for n, size in each.items() if n.startswith("trajectories")} for each in written]
    blocks = ["trajectories.safetensors", *(f"trajectories-{i}.safetensors" for i in (1, 2, 3))]
    # The baseline is the first audit of the first block.
    assert [list(each) for each in of_scores] == [[blocks[i // 3]] for i in range(1, 11)]
    assert max(size for each in of_scores for size in each.values()) == of_scores[1][blocks[0]]
    np.testing.assert_equal(Trajectories.load(tmp_path / blocks[0]).scores, auditor.trajectories.scores)


def test_a_history_that_could_not_be_written_is_written_whole_at_the_next_audit(tmp_path, monkeypatch):
    _, canaries = draw()
    auditor = PrivacyAuditor(canaries, output_dir=tmp_path)
    auditor.begin(make_model())

    def full(*_arguments):
        with (tmp_path / "history.jsonl").open("a") as file:
            file.write('{"half": "of a li')
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ezmia_callbacks.results.history.append", full)
        auditor.mark_failed("no memory", step=1)
    auditor.mark_failed("no memory", step=2)

    assert AuditHistory.load(tmp_path / "history.jsonl") == auditor.history
    assert [result.step for result in auditor.history] == [0, 1, 2]
