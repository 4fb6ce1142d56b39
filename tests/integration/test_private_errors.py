"""What an error says of a record's text stays out of all that is kept, shown to others or passed on."""

import copy
import json
import logging
import traceback
from types import SimpleNamespace

import pytest
import torch
from huggingface_tiny import make_trainer
from own_loop import draw, run, train_one_epoch
from tiny import make_model, make_texts, make_tokenizer
from transformers import TrainerCallback

from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditCallback, PrivacyAuditor, distributed
from ezmia_callbacks.audit.seen import SeenCanaries
from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.distributed import on_all_ranks
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.report import render_report, summarize, to_document
from ezmia_callbacks.scoring.rows import encode_canaries

SECRET = "My number is 42"

pytestmark = pytest.mark.usefixtures("checkpoints_of_old_releases")


class QuotingError(Exception):
    """An error of somebody else's, whose every text quotes a record."""

    def __repr__(self):
        return f"QuotingError({SECRET})"


def quote(*_, **__):
    raise QuotingError(SECRET, {"text": SECRET})


def quote_as_cause(*_, **__):
    try:
        quote()
    except QuotingError as error:
        raise AuditError("the records cannot be read") from error


def passed_on(history, folder=None):
    """All that a run leaves for others to see: its reports, and every file of its folder."""
    shown = [json.dumps(to_document(history)), render_report(to_document(history)), summarize(history)]
    shown += [result.describe() for result in history]
    shown += [json.dumps(row) for row in history.to_dicts()]
    files = [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join([*shown, *(path.read_bytes().decode("latin-1") for path in files)])


class Attack:
    """An attack of the user's that works at the baseline and fails after it."""

    name = "mine"
    is_trained_on_membership = False

    def __init__(self, fail):
        self.fail = fail
        self.n_scored = 0

    def begin(self, model, canaries):
        pass

    def score(self, model, canaries, target, reference):
        self.n_scored += 1
        return list(range(len(canaries.rows))) if self.n_scored == 1 else self.fail(len(canaries.rows))


def failing_later(model, input_ids, attention_mask):
    if not torch.equal(model.transformer.wte.weight, make_model().transformer.wte.weight):
        quote()
    return model(input_ids=input_ids, attention_mask=attention_mask).logits


PARTS = {
    "score": {"score": Attack(quote)},
    "cause": {"score": Attack(quote_as_cause)},
    "no numbers": {"score": Attack(lambda n: [SECRET] * n)},
    "logits_fn": {"logits_fn": failing_later},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("level", [logging.WARNING, logging.DEBUG])
def test_an_audit_that_fails_tells_no_record_but_in_the_log_that_was_asked_for(tmp_path, caplog, part, level):
    rows, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, output_dir=tmp_path, n_audits=2, **copy.deepcopy(PARTS[part]))
    auditor.begin(model)
    train_one_epoch(model, rows, torch.optim.Adam(model.parameters()))

    with caplog.at_level(level, logger="ezmia_callbacks"):
        result = auditor.audit(model)

    assert result.status == "failed"
    assert SECRET not in passed_on(auditor.history, tmp_path)
    assert (SECRET in caplog.text) == (level == logging.DEBUG)
    if part in ("score", "logits_fn"):
        assert result.error.startswith("QuotingError in tests.integration.test_private_errors.quote, line ")
        assert "QuotingError in " in caplog.text
    line = next(each for each in caplog.records if "failed, and training goes on" in each.getMessage())
    assert ("at level DEBUG" in line.getMessage()) == (level == logging.WARNING)


def test_the_error_itself_is_raised_where_that_is_asked_for(tmp_path):
    rows, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, output_dir=tmp_path, logits_fn=failing_later, on_error="raise")
    auditor.begin(model)
    train_one_epoch(model, rows, torch.optim.Adam(model.parameters()))

    with pytest.raises(QuotingError, match=SECRET):
        auditor.audit(model)

    assert AuditHistory.load(tmp_path / "history.jsonl").n_failed == 1
    assert SECRET not in passed_on(auditor.history, tmp_path)


def test_an_error_of_the_package_says_all_it_knows_and_asks_for_no_other_log(caplog):
    rows, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries)
    auditor.begin(model)
    train_one_epoch(model, rows, torch.optim.Adam(model.parameters()))
    with torch.no_grad():
        model.transformer.wte.weight.fill_(torch.nan)

    result = auditor.audit(model)

    assert result.error.startswith("NonFiniteLogitsError: 176 of 176 scored tokens")
    assert result.error.rstrip(".") in caplog.text
    assert "DEBUG" not in caplog.text


def test_batches_that_cannot_be_looked_at_tell_no_record(tmp_path, caplog, monkeypatch):
    rows, canaries = draw()
    monkeypatch.setattr(SeenCanaries, "look", quote)
    auditor = PrivacyAuditor(
        canaries, output_dir=tmp_path, budget=LeakageBudget(limit=0.6, rule="point"), n_audits=1
    )

    run(auditor, rows, n_epochs=1)

    assert "looking at a batch failed (QuotingError in " in auditor.history[-1].decision.message
    assert SECRET not in passed_on(auditor.history, tmp_path) + caplog.text


def test_weights_that_cannot_be_kept_tell_no_record(caplog, monkeypatch):
    rows, canaries = draw()
    auditor = PrivacyAuditor(canaries, budget=LeakageBudget(limit=0.9, rule="point"), n_audits=1)
    auditor.begin(model := make_model())
    monkeypatch.setattr(auditor._weights, "_sample", quote)

    train_one_epoch(model, rows, torch.optim.SGD(model.parameters(), lr=1e-4))
    auditor.audit(model)

    assert "Weights could not be kept" in caplog.text
    assert SECRET not in passed_on(auditor.history) + caplog.text


def test_trackers_and_the_trainers_state_are_told_no_record(tmp_path, caplog):
    rows, canaries = draw()
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append(logs)

        tb_writer = SimpleNamespace(
            add_scalar=lambda *_: None, flush=lambda: None, add_text=lambda *texts: told.append(texts)
        )

    model = make_model()
    audit = PrivacyAuditCallback(canaries, every="epoch", score=Attack(quote))
    trainer = make_trainer(
        tmp_path, rows, [audit, Tracker()], model=model, num_train_epochs=1, save_strategy="epoch"
    )

    trainer.train()
    trainer.save_state()

    assert audit.history.n_failed == 1
    assert any("QuotingError in " in json.dumps(each, default=str) for each in told)
    assert SECRET not in json.dumps(told, default=str)
    assert SECRET not in passed_on(audit.history, tmp_path) + caplog.text


@pytest.mark.parametrize("fail", [quote, quote_as_cause])
def test_other_processes_are_told_no_record(monkeypatch, fail):
    sent = []
    monkeypatch.setattr(distributed, "gather", lambda text: sent.append(text) or [text])

    with pytest.raises((QuotingError, AuditError)):
        on_all_ranks(fail)

    assert sent[0]
    assert SECRET not in sent[0]


def test_chats_that_a_template_refuses_are_not_quoted_by_the_package():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception(messages[0]['content']) }}"
    chats = [
        {"messages": [{"role": "user", "content": f"{SECRET} {text}"}]} for text in make_texts(40, seed=1)
    ]
    canaries = CanarySet.from_lists(chats[:20], chats[20:])

    with pytest.raises(Exception, match=SECRET) as caught:
        encode_canaries(canaries, tokenizer)

    from ezmia_callbacks.post_hoc.reading import _difference, _encode

    encoded = encode_canaries(CanarySet.from_lists(*_as_texts(chats)), tokenizer)
    assert SECRET not in _difference(canaries, encoded, tokenizer, max_length=None)
    with pytest.raises(ConfigurationError) as refused:
        _encode(canaries, tokenizer, max_length=None, source="the tokenizer of the base")
    assert SECRET not in str(refused.value)
    # Whoever sees the traceback, in the process that failed, sees the template's own words.
    assert SECRET in "".join(traceback.format_exception(refused.value))
    assert caught.type is type(refused.value.__cause__)


def _as_texts(chats):
    texts = [chat["messages"][0]["content"] for chat in chats]
    return texts[:20], texts[20:]
