"""Audits are of the canaries that the model was fed, in every shell, on scripts that people really run."""

import json
import logging

import numpy as np
import own_loop
import pytest
import torch
import transformers
from huggingface_tiny import StopAfter, make_trainer
from lightning import pytorch as pl
from lightning_tiny import TinyModule, make_loader
from lightning_tiny import make_trainer as make_lightning_trainer
from packaging.version import Version
from sklearn.metrics import roc_auc_score
from tiny import make_model, make_rows, make_texts
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler
from transformers import Trainer, TrainerCallback

from ezmia_callbacks import (
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    PrivacyAuditor,
    hold_out_canaries,
)
from ezmia_callbacks.errors import ConfigurationError, OverlappingCanariesError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    # Lightning reads a part of torch's that has another name by now.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer"),
]

# Over it goes whatever is learned of those that were fed.
SOON = LeakageBudget(limit=0.6, rule="point")


def draw_many(n_members=60, n_non_members=60):
    """240 rows, 180 of them for training, in 23 batches of 8."""
    return hold_out_canaries(
        make_rows(make_texts(240)), n_members=n_members, n_non_members=n_non_members, seed=0
    )


def members_among(rows, canaries):
    """Ids of the members that are among some training rows."""
    fed = {tuple(row["input_ids"]) for row in rows}
    return {
        record_id
        for record_id, record, is_member in zip(
            canaries.record_ids, canaries.records, canaries.is_member, strict=True
        )
        if is_member and tuple(record["input_ids"]) in fed
    }


def seen_by(auditor):
    ids, is_member = auditor.encoded.record_ids, auditor.encoded.is_member
    return {ids[i] for i in np.flatnonzero(auditor.exposures.is_seen & is_member)}


def auc_of(auditor, result, ids):
    """AUC of these members against all non-members, by another library."""
    chosen = np.array([record_id in ids for record_id in auditor.encoded.record_ids])
    is_member = auditor.encoded.is_member
    counted = chosen | ~is_member
    return roc_auc_score(is_member[counted], result.scores[counted])


class QuarterTrainer(Trainer):
    """Reads a quarter of its data, as curricula and samplers of one's own do."""

    def _get_train_sampler(self, *args):
        return SubsetRandomSampler(range(len(self.train_dataset) // 4))


def test_rows_that_a_sampler_leaves_out_dilute_nothing_and_are_named(tmp_path, caplog):
    rows, canaries = draw_many()
    audit = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path, rows, [audit], trainer_class=QuarterTrainer, num_train_epochs=10).train()

    fed, last = members_among(rows[: len(rows) // 4], canaries), audit.history[-1]

    assert seen_by(audit.auditor) == fed
    assert last.n_members_seen == len(fed) < 30
    assert last.metrics["auc"].value == pytest.approx(auc_of(audit.auditor, last, fed), abs=1e-12)
    everyone = set(audit.auditor.encoded.record_ids)
    assert last.metrics["auc"].value > auc_of(audit.auditor, last, everyone) + 0.1
    assert f"{60 - len(fed)} of 60 members were never fed whole" in caplog.text
    assert "sampler" in caplog.text


def test_what_was_not_fed_enough_is_not_judged_and_no_weights_are_kept_for_it(tmp_path, caplog):
    rows, canaries = draw_many()
    budget = LeakageBudget(limit=0.9)
    audit = PrivacyAuditCallback(canaries, budget=budget, every="epoch")
    make_trainer(tmp_path, rows[-40:], [audit], num_train_epochs=2, learning_rate=1e-6).train()

    for result in audit.history.audits_after_baseline:
        assert result.decision.is_within_budget is None
        assert not result.decision.stop
        assert result.describe().startswith("not judged: ")
        assert "over_budget" not in result.to_metrics()
    assert audit.history.last_within_budget.is_baseline
    assert "Training ended without a verdict, so that the model may be OVER BUDGET" in caplog.text


def test_inside_the_first_epoch_the_figure_is_that_of_the_members_fed_to_the_last_digit():
    rows, canaries = draw_many()
    model, auditor = make_model(), PrivacyAuditor(canaries)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    for start in range(0, len(rows), 40):
        part = rows[start : start + 40]
        own_loop.train_one_epoch(model, part, optimizer)
        result = auditor.audit(model)
        fed = members_among(rows[: start + 40], canaries)

        assert seen_by(auditor) == fed
        assert result.n_members_seen == len(fed)
        assert result.n_members == 60
        if len(fed) >= 10:
            expected = auc_of(auditor, result, fed)
            assert result.metrics["auc"].value == pytest.approx(expected, abs=1e-12)
        if len(fed) >= 40:
            order = np.argsort(-auditor.exposures.last_step, kind="stable")
            members = [i for i in order if auditor.encoded.is_member[i]][: -(-len(fed) // 4)]
            recent = {auditor.encoded.record_ids[i] for i in members}
            expected = auc_of(auditor, result, recent)
            assert result.auc_recent.value == pytest.approx(expected, abs=1e-12)
            assert "auc_recent" in result.to_metrics()


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        while True:
            yield from self.rows


def test_of_a_stream_nothing_is_said_about_epochs(tmp_path, caplog):
    rows, canaries = draw_many()
    audit = PrivacyAuditCallback(canaries, every=10)
    make_trainer(tmp_path, Stream(rows), [audit], max_steps=60).train()

    halfway, last = audit.history[-4], audit.history[-1]

    # The trainer calls 30 of 60 steps half an epoch: every member was fed by then.
    assert (halfway.step, halfway.n_members_seen) == (30, 60)
    assert {result.epoch for result in audit.history.audits_after_baseline} == {None}
    assert audit.auditor.exposures.n_times.max() >= 2
    # The base is untrained, so that every token moves up; nothing is said about feeding.
    assert {finding.name for finding in last.findings} <= {"no downward shift"}


@pytest.mark.parametrize("limit", [{"limit_train_batches": 0.25}, {"overfit_batches": 5}])
def test_lightning_audits_what_its_limits_let_through(tmp_path, limit, caplog):
    rows, canaries = draw_many()
    audit = LightningPrivacyAuditCallback(canaries, every="epoch")
    trainer = make_lightning_trainer(tmp_path, [audit], max_epochs=8, **limit)
    trainer.fit(TinyModule(), make_loader(rows))
    n_batches = limit.get("overfit_batches", 5)

    fed, last = members_among(rows[: 8 * n_batches], canaries), audit.history[-1]

    assert seen_by(audit.auditor) == fed
    assert last.metrics["auc"].value == pytest.approx(auc_of(audit.auditor, last, fed), abs=1e-12)
    assert "were never fed whole" in caplog.text


class ByHand(TinyModule):
    """Manual optimization with an optimizer that Lightning never sees: its step count stays 0."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.own = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def configure_optimizers(self):
        return None

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        self.model(**batch).loss.backward()
        self.own.step()


@pytest.mark.parametrize("every", ["epoch", 4, 0.5])
def test_lightning_audits_steps_that_no_counter_shows(tmp_path, every):
    rows, canaries = draw_many()
    audit = LightningPrivacyAuditCallback(canaries, every=every)
    trainer = make_lightning_trainer(tmp_path, [audit], max_epochs=2)
    trainer.fit(ByHand(), make_loader(rows))

    assert trainer.global_step == 0
    expected = {"epoch": [0, 23, 46], 4: [*range(0, 45, 4), 46], 0.5: [0, 12, 24, 36, 46]}[every]
    steps = [result.step for result in audit.history]
    assert set(expected) <= set(steps)
    assert audit.history[-1].n_members_seen == 60
    assert audit.history[-1].metrics["auc"].value != 0.5


def test_lightning_stops_a_run_whose_steps_no_counter_shows(tmp_path):
    rows, canaries = draw_many()
    audit = LightningPrivacyAuditCallback(canaries, budget=SOON, every="epoch")
    module = ByHand()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    make_lightning_trainer(tmp_path, [audit], max_epochs=30).fit(module, make_loader(rows))

    stopped, kept = audit.history.stopped, audit.history.last_within_budget
    assert stopped is not None
    is_start = all(torch.equal(tensor, start[name]) for name, tensor in module.state_dict().items())
    assert is_start is kept.is_baseline


def contaminated():
    """Rows among which a non-member comes late, in a form that no check of the dataset knows."""
    rows, canaries = draw_many()
    at = int(np.flatnonzero(~canaries.is_member)[3])
    record = {**rows[0], "input_ids": canaries.records[at]["input_ids"]}
    return rows, canaries, record, canaries.record_ids[at]


def test_a_non_member_that_is_fed_is_named_and_counts_nowhere(caplog):
    rows, canaries, record, record_id = contaminated()
    model, auditor = make_model(), PrivacyAuditor(canaries)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    own_loop.train_one_epoch(model, rows, optimizer)
    clean = auditor.audit(model)
    own_loop.train_one_epoch(model, [record] * 4, optimizer)

    result = auditor.audit(model)

    assert (clean.n_non_members, result.n_non_members) == (60, 59)
    assert [f.name for f in result.findings] == ["contamination"]
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert f"1 non-member was fed in training: {record_id}." in errors[0]
    chosen = np.array([name != record_id for name in auditor.encoded.record_ids])
    expected = roc_auc_score(auditor.encoded.is_member[chosen], result.scores[chosen])
    assert result.metrics["auc"].value == pytest.approx(expected, abs=1e-12)


def test_contamination_ends_a_run_that_asked_for_errors():
    rows, canaries, record, record_id = contaminated()
    model, auditor = make_model(), PrivacyAuditor(canaries, on_error="raise")
    auditor.begin(model)
    own_loop.train_one_epoch(model, [*rows, record], torch.optim.Adam(model.parameters()))

    with pytest.raises(OverlappingCanariesError, match=record_id):
        auditor.audit(model)
    assert auditor.history[-1].findings[0].name == "contamination"


class MixesIn:
    """A collator that puts a record of another source into the batches after a while."""

    def __init__(self, collate, record, *, after):
        self.collate, self.record, self.n_left = collate, record, after

    def __call__(self, rows):
        # A single row is an audit's, not training's.
        if len(rows) > 1:
            self.n_left -= 1
            if self.n_left < 0:
                rows = [*rows[:-1], self.record]
        return self.collate(rows)


def test_contamination_in_the_middle_of_a_run_is_an_error_before_the_next_verdict(tmp_path, caplog):
    rows, canaries, record, record_id = contaminated()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.9999, rule="point"), every=10)
    collate = make_trainer(tmp_path, rows).data_collator
    make_trainer(
        tmp_path, rows, [audit], collator=MixesIn(collate, dict(record), after=30), max_steps=40
    ).train()

    by_step = {result.step: result.n_non_members for result in audit.history}
    assert by_step == {0: 60, 10: 60, 20: 60, 30: 60, 40: 59}
    assert f"1 non-member was fed in training: {record_id}" in caplog.text


def test_records_that_training_cuts_are_cut_in_the_audit_too(caplog):
    texts = make_texts(240, n_words=24)
    rows, canaries = hold_out_canaries(make_rows(texts), n_members=60, n_non_members=60, seed=0)
    model, auditor = make_model(), PrivacyAuditor(canaries)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    for _ in range(3):
        own_loop.train_one_epoch(model, [{"input_ids": row["input_ids"][:16]} for row in rows], optimizer)
        result = auditor.audit(model)

    assert result.n_members_seen == 60
    assert result.n_tokens == 120 * 15
    assert {len(row.input_ids) for row in auditor.encoded.rows} == {16}
    assert "Training feeds at most 16 tokens of a record: the 120 canaries that are longer" in caplog.text
    assert caplog.text.count("Training feeds at most") == 1
    by_hand = PrivacyAuditor(
        canaries.select(
            range(len(canaries)),
            records=[{"input_ids": record["input_ids"][:16]} for record in canaries.records],
        ),
        assume_seen=True,
    )
    start = make_model()
    by_hand.begin(start)
    start.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(by_hand.audit(start).scores, result.scores)


def test_a_run_whose_records_were_cut_resumes_with_them_cut():
    rows, canaries = hold_out_canaries(
        make_rows(make_texts(240, n_words=24)), n_members=60, n_non_members=60, seed=0
    )
    cut = [{"input_ids": row["input_ids"][:16]} for row in rows]
    model, auditor = make_model(), PrivacyAuditor(canaries)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    own_loop.train_one_epoch(model, cut, optimizer)
    auditor.audit(model)
    state = auditor.state_dict()

    again = PrivacyAuditor(canaries)
    again.load_state_dict(state)
    again.begin(model)
    own_loop.train_one_epoch(model, cut, optimizer)

    expected, found = auditor.audit(model), again.audit(model)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert again.exposures.n_times[again.encoded.is_member].min() == 2


def test_records_cut_at_the_boundaries_of_blocks_count_where_they_are_whole():
    rows, canaries = draw_many()
    stream = np.concatenate([row["input_ids"] for row in rows])
    blocks = [{"input_ids": stream[i : i + 32].tolist()} for i in range(0, len(stream) - 31, 32)]
    model, auditor = make_model(), PrivacyAuditor(canaries)
    auditor.begin(model)
    own_loop.train_one_epoch(model, blocks, torch.optim.Adam(model.parameters(), lr=1e-2))

    result = auditor.audit(model, epoch=1.0)

    n_whole = n_partly = 0
    for record, is_member in zip(canaries.records, canaries.is_member, strict=True):
        ids = record["input_ids"]
        parts = [len(ids) for block in blocks for i in range(21) if block["input_ids"][i : i + 12] == ids]
        n_whole += bool(is_member and parts)
        windows = [ids[i : i + 8] for i in range(5)]
        is_there = any(block["input_ids"][i : i + 8] in windows for block in blocks for i in range(25))
        n_partly += bool(is_member and not parts and is_there)
    assert result.n_members_seen == n_whole
    assert 10 < n_whole < 60
    (finding,) = (f for f in result.findings if f.name == "members never fed")
    assert f"{60 - n_whole} of 60 members were never fed whole (of {n_partly} a part)" in finding.text


def test_one_callback_serves_folds_each_with_its_own_data_reference_folder_and_history(tmp_path):
    audit = PrivacyAuditCallback(every="epoch", n_members=40, n_non_members=40)
    models, aucs = [], []
    for fold in range(2):
        train, others = make_rows(make_texts(80, seed=fold)), make_rows(make_texts(60, seed=10 + fold))
        model = make_model(seed=fold)
        trainer = make_trainer(
            tmp_path, train, [audit], model=model, eval_dataset=others, num_train_epochs=12
        )
        trainer.train()
        models.append(audit.auditor.reference.log_probs)
        aucs.append(audit.history[-1].metrics["auc"].value)
        assert audit.history[-1].n_members_seen == 40

    assert min(aucs) > 0.6
    assert not np.array_equal(*models)
    assert [len(history) for history in audit.histories] == [13, 13]
    assert audit.histories[-1] is audit.history
    first, second = (tmp_path / name / "history.jsonl" for name in ("_privacy_audit", "_privacy_audit_2"))
    assert first.read_text() != second.read_text()
    assert len(second.read_text().splitlines()) == 14


def test_lightning_folds_have_a_folder_and_a_history_each(tmp_path):
    rows, canaries = draw_many()
    audit = LightningPrivacyAuditCallback(canaries, every="epoch")
    for _ in range(2):
        make_lightning_trainer(tmp_path, [audit], max_epochs=2).fit(TinyModule(), make_loader(rows))

    assert [len(history) for history in audit.histories] == [3, 3]
    for name in ("_privacy_audit", "_privacy_audit_2"):
        assert len((tmp_path / name / "history.jsonl").read_text().splitlines()) == 4


class TrainsAnother(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch == 1:
            self.trainer.train()


def test_one_callback_in_two_trainers_at_once_is_refused(tmp_path):
    rows, canaries = draw_many()
    audit = PrivacyAuditCallback(canaries)
    inner = make_trainer(tmp_path / "inner", rows, [audit], num_train_epochs=1)
    outer = make_trainer(tmp_path / "outer", rows, [audit, TrainsAnother(inner)])

    with pytest.raises(ConfigurationError, match="Another trainer has begun"):
        outer.train()


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_exposures_go_on_where_a_run_resumes(tmp_path):
    rows, canaries = draw_many()
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 10}
    whole = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path / "whole", rows, [whole], **settings).train()
    first = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path / "parts", rows, [first, StopAfter(30)], **settings).train()
    (note,) = (tmp_path / "parts" / "_privacy_audit" / "checkpoints").glob("30-*.json")
    kept = json.loads(note.read_text())["exposures"]
    second = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path / "parts", rows, [second], **settings).train(resume_from_checkpoint=True)

    assert sum(kept["n_times"]) > 60
    assert second.auditor.exposures.n_times.tolist() == whole.auditor.exposures.n_times.tolist()
    assert second.auditor.exposures.last_step.tolist() == whole.auditor.exposures.last_step.tolist()
    assert second.history[-1].metrics == whole.history[-1].metrics


def test_lightning_exposures_go_on_where_a_run_resumes(tmp_path):
    rows, canaries = draw_many()

    def fit(name, *, max_epochs, ckpt_path=None):
        audit = LightningPrivacyAuditCallback(canaries, every="epoch")
        trainer = make_lightning_trainer(tmp_path / name, [audit], max_epochs=max_epochs)
        trainer.fit(TinyModule(), make_loader(rows), ckpt_path=ckpt_path)
        return trainer, audit

    _, whole = fit("whole", max_epochs=2)
    trainer, _ = fit("parts", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, second = fit("parts", max_epochs=2, ckpt_path=tmp_path / "one.ckpt")

    assert whole.auditor.exposures.n_times[whole.auditor.encoded.is_member].tolist() == [2] * 60
    assert second.auditor.exposures.to_dict() == whole.auditor.exposures.to_dict()


def test_a_loop_that_calls_another_object_is_not_believed(caplog):
    rows, canaries = draw_many()
    model, auditor = make_model(), PrivacyAuditor(canaries, budget=SOON, n_audits=2)
    inner = model.transformer
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    model.train()
    for row in rows[:16]:
        model.lm_head(inner(torch.tensor([row["input_ids"]])).last_hidden_state).logsumexp(
            -1
        ).sum().backward()
        optimizer.step()

    result = auditor.audit(model)

    assert result.decision.is_within_budget is None
    assert result.decision.message == "not judged yet: no batch was seen"
    assert "assume_seen=True" in caplog.text
    assert result.metrics["auc"].value is None
    assert result.describe() == "not judged: no batch was seen; audit at step 1"


def test_what_cannot_be_seen_can_be_believed():
    _, canaries = draw_many()
    model, auditor = make_model(), PrivacyAuditor(canaries, budget=SOON, n_audits=2, assume_seen=True)
    auditor.begin(model)

    result = auditor.audit(model)

    assert result.n_members_seen is None
    assert result.decision.is_within_budget
    assert result.findings == ()


def test_a_run_that_never_fed_a_canary_has_no_figures():
    _, canaries = draw_many()
    others = make_rows(make_texts(80, seed=5))
    model, auditor = make_model(), PrivacyAuditor(canaries)
    auditor.begin(model)
    own_loop.train_one_epoch(model, others, torch.optim.Adam(model.parameters(), lr=1e-2))

    result = auditor.audit(model, epoch=1.0)

    assert result.n_members_seen == 0
    assert all(measured.value is None for measured in result.metrics.values())
    assert "no figures (0 members and " in result.describe()
    assert result.member_loss is None
    assert [finding.name for finding in result.findings] == ["members never fed"]


# The compiler reads `.grad` of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*torch.cpu.amp.autocast")
@pytest.mark.parametrize(
    "settings", [{"gradient_accumulation_steps": 4}, {"torch_compile": True}, {"bf16": True}]
)
def test_trainer_features_hide_no_batch(tmp_path, settings):
    rows, canaries = draw_many()
    if "torch_compile" in settings:
        settings |= {"torch_compile_backend": "eager"}
    audit = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path, rows, [audit], num_train_epochs=2, **settings).train()

    exposures, is_member = audit.auditor.exposures, audit.auditor.encoded.is_member
    # Old releases leave out what does not fill an accumulation at the end of an epoch.
    is_old = Version(transformers.__version__) < Version("5") and "gradient_accumulation_steps" in settings
    assert set(exposures.n_times[is_member]) == ({0, 1, 2} if is_old else {2}) & set(
        exposures.n_times[is_member]
    )
    assert exposures.n_times[is_member].mean() > 1.5
    assert exposures.n_times[~is_member].tolist() == [0] * 60


def test_a_quarter_that_was_fed_and_memorized_is_over_budget(tmp_path):
    """The sentence of the first version was "within budget": three quarters of the members were not fed."""
    rows, canaries = draw_many(n_members=120)
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.7, rule="point"), every="epoch")
    trainer = make_trainer(
        tmp_path, rows, [audit], trainer_class=QuarterTrainer, num_train_epochs=20, learning_rate=2e-2
    )
    trainer.train()

    assert audit.history.stopped is not None or audit.history.is_unjudged(audit.history[-1])
    assert not any(
        result.decision.is_within_budget and result.metrics["auc"].value > 0.7
        for result in audit.history.audits_after_baseline
    )


def test_groups_count_once_one_of_their_records_was_fed():
    rows = [{**row, "author": i // 2} for i, row in enumerate(make_rows(make_texts(160)))]
    rows, canaries = hold_out_canaries(rows, n_members=40, n_non_members=40, group_by="author", seed=0)
    rows = [{"input_ids": row["input_ids"]} for row in rows]
    model, auditor = make_model(), PrivacyAuditor(canaries)
    auditor.begin(model)
    own_loop.train_one_epoch(model, rows[:41], torch.optim.Adam(model.parameters(), lr=1e-2))

    result = auditor.audit(model)

    assert (result.n_members_seen, result.n_members, result.n_non_members) == (21, 40, 40)


def test_a_data_loader_of_ones_own_with_another_collator_is_seen(tmp_path):
    rows, canaries = draw_many()

    class OwnLoader(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=16, collate_fn=self.data_collator)

    audit = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path, rows, [audit], trainer_class=OwnLoader, num_train_epochs=1).train()

    assert audit.history[-1].n_members_seen == 60


class TwoModels(pl.LightningModule):
    """A module whose training step is compiled: nothing of it can be looked at."""

    def __init__(self):
        super().__init__()
        self.model = make_model()

    def training_step(self, batch, batch_idx):
        return torch.compile(self.model.forward, backend="eager")(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_lightning_batches_that_go_past_the_model_are_not_believed(tmp_path, caplog):
    rows, canaries = draw_many()
    audit = LightningPrivacyAuditCallback(canaries, budget=SOON, every="epoch")
    make_lightning_trainer(tmp_path, [audit], max_epochs=1).fit(TwoModels(), make_loader(rows))

    assert audit.history.is_unjudged(audit.history[-1])
    assert "Training ended without a verdict" in caplog.text


class WithTypes(torch.nn.Module):
    """A model whose logits depend on a further input."""

    def __init__(self):
        super().__init__()
        self.model = make_model()
        self.types = torch.nn.Embedding(2, 64)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, use_cache=False):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits if token_type_ids is None else logits + self.types(token_type_ids)


def train_with(model, rows, **inputs):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        n = len(ids[0])
        logits = model(input_ids=ids, **{name: make(n) for name, make in inputs.items()})
        logits = getattr(logits, "logits", logits)
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("token_type_ids", lambda n: torch.ones(1, n, dtype=torch.long), "with token_type_ids"),
        ("position_ids", lambda n: torch.arange(5, 5 + n)[None], "positions do not begin at 0"),
    ],
)
def test_inputs_of_a_hand_written_loop_that_the_audit_lacks_leave_no_verdict(name, make, expected, caplog):
    rows, canaries = draw_many()
    model = WithTypes() if name == "token_type_ids" else make_model()
    auditor = PrivacyAuditor(canaries, budget=SOON, n_audits=2)
    auditor.begin(model)
    train_with(model, rows, **{name: make})

    result = auditor.audit(model)

    assert result.decision.is_within_budget is None
    assert expected in result.decision.message
    assert "logits_fn" in caplog.text


def test_left_padding_of_a_hand_written_loop_leaves_no_verdict():
    rows, canaries = draw_many()
    model, auditor = make_model(), PrivacyAuditor(canaries, budget=SOON, n_audits=2)
    auditor.begin(model)
    padded = [{"input_ids": [0] * 4 + row["input_ids"]} for row in rows]
    train_with(model, padded, attention_mask=lambda n: torch.tensor([[0] * 4 + [1] * (n - 4)]))

    result = auditor.audit(model)

    assert result.decision.is_within_budget is None
    assert "padding on the left" in result.decision.message


def test_positions_that_count_from_the_start_of_each_record_are_as_good_as_none():
    rows, canaries = draw_many()
    model, auditor = make_model(), PrivacyAuditor(canaries, budget=SOON, n_audits=2)
    auditor.begin(model)
    train_with(model, rows, position_ids=lambda n: torch.arange(n)[None])

    assert auditor.audit(model).decision.is_within_budget is not None


def test_a_logits_function_of_ones_own_is_believed():
    rows, canaries = draw_many()
    model = WithTypes()
    auditor = PrivacyAuditor(
        canaries,
        budget=SOON,
        n_audits=2,
        logits_fn=lambda module, ids, mask: module(ids, mask, torch.ones_like(ids)),
    )
    auditor.begin(model)
    train_with(model, rows, token_type_ids=lambda n: torch.ones(1, n, dtype=torch.long))

    assert auditor.audit(model).decision.is_within_budget is not None


def test_records_that_training_cuts_no_longer_are_whole_again(caplog):
    """A curriculum of lengths: what was fed of a record that was cut is no exposure of the whole."""
    rows, canaries = hold_out_canaries(
        make_rows(make_texts(240, n_words=24)), n_members=60, n_non_members=60, seed=0
    )
    model, auditor = make_model(), PrivacyAuditor(canaries)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    own_loop.train_one_epoch(model, [{"input_ids": row["input_ids"][:14]} for row in rows], optimizer)
    cut = auditor.audit(model)
    own_loop.train_one_epoch(model, rows[:8], optimizer)
    between = auditor.audit(model)
    own_loop.train_one_epoch(model, rows, optimizer)
    whole = auditor.audit(model)

    assert (cut.n_members_seen, cut.n_non_members, cut.n_tokens) == (60, 60, 120 * 13)
    assert (between.n_members_seen, between.n_tokens) == (0, 120 * 23)
    assert (whole.n_members_seen, whole.n_non_members, whole.n_tokens) == (60, 60, 120 * 23)
    assert "Training does not cut its records any more" in caplog.text


def test_near_copies_of_non_members_in_training_are_named():
    rows, canaries = draw_many()
    ids = [record["input_ids"] for record in canaries.records]
    near = [
        {"input_ids": [*tokens[:-1], tokens[-1] % 40 + 3]}
        for tokens, is_member in zip(ids, canaries.is_member, strict=True)
        if not is_member
    ]
    model, auditor = make_model(), PrivacyAuditor(canaries)
    auditor.begin(model)
    own_loop.train_one_epoch(model, [*rows, *near], torch.optim.Adam(model.parameters(), lr=1e-2))

    findings = [f for f in auditor.audit(model).findings if f.name != "no downward shift"]
    (finding,) = findings

    assert finding.text.startswith("60 non-members were fed in large part")


def test_lightning_with_a_fused_optimizer_of_its_own_is_audited(tmp_path):
    rows, canaries = draw_many()
    module = ByHand()
    module.own = torch.optim.AdamW(module.model.parameters(), lr=1e-2, fused=True)
    audit = LightningPrivacyAuditCallback(canaries, every="epoch")
    make_lightning_trainer(tmp_path, [audit], max_epochs=2).fit(module, make_loader(rows))

    assert [result.step for result in audit.history] == [0, 23, 46]
