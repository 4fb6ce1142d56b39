"""Audits that keep under a share of the training time, on a clock that only the tests move."""

import logging
import time

import numpy as np
import pytest
import torch
from contract_shells import PlainModule, make_loader
from huggingface_tiny import make_trainer as make_hf_trainer
from lightning_tiny import make_trainer as make_lightning_trainer
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import (
    AuditHistory,
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    PrivacyAuditor,
    hold_out_canaries,
)
from ezmia_callbacks.audit.economy import affordable_share
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional import has_enough_power

N_MEMBERS, N_NON_MEMBERS = 100, 200
# Of the error rate, with four audits.
SHARE = {"failure_probability": 0.05 / 4}


def draw(**how):
    how = how or {"n_members": N_MEMBERS, "n_non_members": N_NON_MEMBERS}
    return hold_out_canaries(make_rows(make_texts(500)), seed=0, **how)[1]


@pytest.fixture
def clock(monkeypatch):
    """Time stands still but for what the tests add."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def timed_model(clock, *, seconds_per_record=0.01):
    """A model whose passes in evaluation mode take time."""
    model = make_model()

    def spend(module, args, options):
        if not module.training and len(options["input_ids"]) > 2:
            clock.now += seconds_per_record * len(options["input_ids"])

    model.register_forward_pre_hook(spend, with_kwargs=True)
    return model.train()


def run(clock, *, training_seconds, n_audits=4, canaries=None, auditor=None, **options):
    """Begin, and audit after each interval of training; returns the auditor."""
    model = timed_model(clock)
    options = {"max_overhead": 0.05, "n_audits": n_audits, **options}
    auditor = PrivacyAuditor(canaries or draw(), **options) if auditor is None else auditor
    auditor.begin(model)
    for _ in range(n_audits):
        clock.now += training_seconds
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        auditor.audit(model)
    return auditor


# --- the choice -------------------------------------------------------------------------------------------


def test_what_was_spent_before_the_first_step_is_won_back_where_the_number_of_audits_is_known():
    times = {"training_seconds": 100.0, "scoring_seconds": 10.0, "other_seconds": 1.0, "spent_seconds": 8.0}

    assert affordable_share(0.05, n_audits=None, **times) == pytest.approx(0.4)
    assert affordable_share(0.05, n_audits=4, **times) == pytest.approx(0.2)
    assert affordable_share(0.5, n_audits=4, **times) == 1.0
    assert affordable_share(0.01, n_audits=4, **times) < 0.0


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 5.0])
def test_a_share_that_is_none_is_refused(value):
    for build in (PrivacyAuditor, PrivacyAuditCallback):
        with pytest.raises(ConfigurationError, match="`max_overhead` must lie in"):
            build(draw(), max_overhead=value)


def test_an_attack_of_the_users_is_not_given_a_part():
    class Attack:
        name, is_trained_on_membership = "mine", False

        def begin(self, model, canaries):
            pass

        def score(self, model, canaries, target, reference):
            return np.zeros(len(canaries.rows))

    with pytest.raises(ConfigurationError, match="use a built-in score"):
        PrivacyAuditor(draw(), score=Attack(), max_overhead=0.05)


# --- the run ----------------------------------------------------------------------------------------------


def test_audits_keep_to_the_share_of_the_training_time(clock, caplog):
    caplog.set_level(logging.INFO)

    # The baseline takes 3 seconds; four audits may take 5 in all with it, 0.5 each.
    auditor = run(clock, training_seconds=25.0)

    sizes = [(result.n_members, result.n_non_members) for result in auditor.history]
    assert sizes == [(100, 200), *4 * [(16, 33)]]
    assert 0.049 < auditor.history[-1].overhead <= 0.05
    assert "an AUC of 0.5 is then known to ±0.190 at 95 % confidence" in caplog.text


def test_it_is_always_said_what_audits_took(clock):
    auditor = run(clock, training_seconds=30.0, max_overhead=None)

    assert [result.overhead for result in auditor.history] == [
        None,
        *(pytest.approx(3.0 * (i + 1) / (30.0 * i)) for i in (1, 2, 3, 4)),
    ]
    assert auditor.history[-1].to_metrics()["overhead"] == pytest.approx(15.0 / 120.0)
    assert [result.n_members for result in auditor.history] == 5 * [100]


def test_enough_time_leaves_all_canaries(clock, caplog):
    auditor = run(clock, training_seconds=1000.0)

    assert [result.share for result in auditor.history] == 5 * [1.0]
    assert "audits under" not in caplog.text


def test_the_part_does_not_change_when_training_slows_down(clock):
    model, auditor = timed_model(clock), PrivacyAuditor(draw(), max_overhead=0.05, n_audits=3)
    auditor.begin(model)
    ids = []
    for training_seconds in (40.0, 400.0, 4.0):
        clock.now += training_seconds
        auditor.audit(model)
        ids.append(auditor.encoded.record_ids)

    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) < 300


def test_a_part_is_scored_like_the_whole_would_have_been(clock):
    """Same reference, same records, same figures: only fewer of them."""
    part, whole = (run(clock, training_seconds=25.0, max_overhead=m) for m in (0.05, None))

    chosen = np.isin(whole.encoded.record_ids, part.encoded.record_ids)
    # Batches are others, and with them the last bits.
    np.testing.assert_allclose(
        part.trajectories.scores["ez"][1:], whole.trajectories.scores["ez"][1:, chosen], atol=1e-4
    )
    assert part.trajectories.record_ids == part.encoded.record_ids
    np.testing.assert_array_equal(part.reference.log_probs, whole.reference.select(chosen).log_probs)


def test_a_budget_gets_the_canaries_that_it_needs_even_if_they_take_longer(clock, caplog):
    """To be resolved is not enough: with 13 of each nothing but total leakage would ever be found."""
    auditor = run(clock, training_seconds=1.0, budget=LeakageBudget(limit=0.6))

    n = auditor.history[-1].n_members
    assert 13 < n < N_MEMBERS
    share = {**SHARE, "n_scores": 4}
    assert has_enough_power(LeakageBudget(limit=0.6), n_members=n, n_non_members=2 * n, **share)
    assert not has_enough_power(LeakageBudget(limit=0.6), n_members=n - 1, n_non_members=2 * n - 2, **share)
    assert "fewer canaries could not carry the figures" in caplog.text
    assert f"Audits score {n} members" in caplog.text
    assert auditor.history.run_metadata.n_scored == 3 * n
    assert auditor.history.run_metadata.n_canaries == 300
    assert auditor.history.run_metadata.power in caplog.text
    assert "detects a run over budget with 80 % probability once its true AUC reaches 0.800" in caplog.text


def test_a_budget_that_all_canaries_hardly_carry_gets_them_all(clock, caplog):
    auditor = run(clock, training_seconds=1.0, budget=LeakageBudget(limit=0.6, rule="upper"))

    assert [result.n_members for result in auditor.history] == 5 * [N_MEMBERS]
    assert "Audits score all 100 members and 200 non-members" in caplog.text
    assert "a run that leaks nothing within budget with at least 0 % probability" in caplog.text


@pytest.mark.parametrize(("n_members", "level"), [(13, logging.WARNING), (100, logging.INFO)])
def test_what_canaries_can_hardly_find_is_said_before_the_first_step(n_members, level, caplog):
    """With 13 of each the budget is resolved, and next to nothing would cross it."""
    caplog.set_level(logging.INFO)
    canaries = draw(n_members=n_members, n_non_members=n_members)

    PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.6), n_audits=4).begin(make_model())

    said = [record for record in caplog.records if "over budget" in record.message]
    assert [record.levelno for record in said] == [level]


def test_without_a_budget_nothing_is_said_about_one(clock, caplog):
    caplog.set_level(logging.INFO)

    auditor = run(clock, training_seconds=0.1)

    assert auditor.history[-1].n_members == 10
    assert "from here on" in caplog.text
    assert "over budget" not in caplog.text


def test_a_run_resumed_from_its_folder_keeps_its_part(clock, tmp_path):
    first = run(clock, training_seconds=25.0, output_dir=tmp_path)
    history = AuditHistory.load(tmp_path / "history.jsonl").to_dicts()
    second = PrivacyAuditor(draw(), max_overhead=0.05, n_audits=6, output_dir=tmp_path)
    model = timed_model(clock)

    second.resume(model, history, step=4)
    clock.now += 1000.0
    result = second.audit(model)

    assert second.encoded.record_ids == first.encoded.record_ids
    assert result.share == first.history[-1].share
    assert second.trajectories.steps.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_run_resumed_from_before_its_first_audit_chooses_anew(clock, tmp_path):
    run(clock, training_seconds=25.0, output_dir=tmp_path)
    history = AuditHistory.load(tmp_path / "history.jsonl").to_dicts()
    second = PrivacyAuditor(draw(), max_overhead=0.05, n_audits=6, output_dir=tmp_path)
    model = timed_model(clock)

    second.resume(model, history, step=0)
    clock.now += 30.0

    # All would take 3 seconds, as the baseline did; half of that is allowed.
    assert second.audit(model).n_members == N_MEMBERS // 2


def test_another_begin_scores_all_canaries_and_chooses_anew(clock):
    auditor = run(clock, training_seconds=25.0)

    run(clock, training_seconds=1000.0, auditor=auditor)

    assert [result.n_members for result in auditor.history] == 5 * [N_MEMBERS]
    assert auditor.trajectories.scores["ez"].shape == (5, N_MEMBERS + N_NON_MEMBERS)
    assert auditor.history.run_metadata.n_scored == auditor.history.run_metadata.n_canaries == 300


def test_a_state_carries_the_part_and_the_whole_reference(clock):
    first = run(clock, training_seconds=25.0)
    second = PrivacyAuditor(draw(), max_overhead=0.05, n_audits=6)

    second.load_state_dict(first.state_dict())
    model = timed_model(clock)
    second.begin(model, step=4)
    result = second.audit(model, step=5)

    assert second.encoded.record_ids == first.encoded.record_ids
    assert result.n_members == first.history[-1].n_members
    assert second.trajectories.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert second.state_dict()["reference"]["offsets"].shape == (301,)


def with_huggingface(folder, canaries, rows, **options):
    model, audit = make_model(), PrivacyAuditCallback(canaries, **options)
    trainer = make_hf_trainer(folder, rows, [audit], model=model, num_train_epochs=2)
    trainer.train()
    return audit.history, model, trainer.state.log_history


def with_lightning(folder, canaries, rows, **options):
    module, audit = PlainModule(make_model()), LightningPrivacyAuditCallback(canaries, **options)
    trainer = make_lightning_trainer(folder, [audit], max_epochs=2)
    trainer.fit(module, make_loader(rows))
    return audit.history, module.model, [trainer.callback_metrics]


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`:UserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
)
@pytest.mark.parametrize("train", [with_huggingface, with_lightning])
def test_callbacks_score_a_part_log_what_it_took_and_leave_training_as_it_was(train, tmp_path):
    rows, canaries = hold_out_canaries(make_rows(make_texts(156)), n_members=40, n_non_members=60, seed=0)

    _, expected, _ = train(tmp_path / "whole", canaries, rows)
    history, model, logs = train(tmp_path / "part", canaries, rows, max_overhead=1e-6)

    assert [result.n_members for result in history] == [40, 10, 10]
    assert history[-1].overhead > 0
    assert any("privacy/overhead" in entry for entry in logs)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)
