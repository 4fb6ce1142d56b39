import io
import json
import logging
from pathlib import Path

import matplotlib as mpl
import pytest
from rich.console import Console

from ezmia_callbacks import AuditHistory, AuditResult, Decision
from ezmia_callbacks.demo import run as demo
from ezmia_callbacks.demo.base_model import BaseModelRecipe, train_base_model
from ezmia_callbacks.demo.corpus import standard_library_docstrings
from ezmia_callbacks.demo.run import FULL, LORA, DemoSettings, run_demo
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.results.result import Measurement

mpl.use("Agg")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning",
)


@pytest.fixture(scope="module")
def records():
    return standard_library_docstrings()[:240]


@pytest.fixture
def small_base(monkeypatch, records):
    """A base model of a few steps, so that the demo's own path takes seconds."""
    recipe = BaseModelRecipe(vocabulary_size=400, hidden_size=32, n_steps=3, n_positions=64, block_length=32)

    def train(texts, *, seed, show_progress):
        return train_base_model(texts, seed=seed, recipe=recipe)

    monkeypatch.setattr(demo, "train_base_model", train)
    monkeypatch.setattr(demo, "standard_library_docstrings", lambda: records)


@pytest.fixture
def data(tmp_path, records):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    return path


def show(settings):
    text = io.StringIO()
    histories = run_demo(settings, console=Console(file=text, width=160))
    return histories, text.getvalue()


def test_the_whole_job_leaves_table_picture_summary_and_histories(tmp_path, small_base, data):
    settings = DemoSettings(
        data=data,
        output_dir=tmp_path / "out",
        n_epochs=12,
        n_train=60,
        n_members=40,
        n_non_members=60,
        max_length=24,
        limit=0.85,
        full_learning_rate=2e-2,
        lora_learning_rate=1e-4,
    )

    level = logging.getLogger("ezmia_callbacks").level

    histories, printed = show(settings)

    assert logging.getLogger("ezmia_callbacks").level == level
    assert list(histories) == [FULL, LORA]
    assert histories[FULL].stopped is not None
    assert histories[LORA].stopped is None
    assert "> 0.850 -> STOP" in printed
    kept = histories[FULL].last_within_budget
    where = "the starting weights" if kept.is_baseline else f"the weights of epoch {kept.epoch:g}"
    assert f"{where} were restored" in printed
    assert "LoRA stayed within the budget" in printed
    for name in (FULL, LORA):
        for result in histories[name]:
            assert f"{result.metrics['auc'].value:.3f} [" in printed
        saved = tmp_path / "out" / name.split()[0].lower() / "_privacy_audit" / "history.jsonl"
        assert AuditHistory.load(saved).to_dicts() == histories[name].to_dicts()
    assert (tmp_path / "out" / "leakage.png").read_bytes().startswith(b"\x89PNG")
    assert "<title>ezmia demo</title>" in (tmp_path / "out" / "report.html").read_text()
    assert "# ezmia demo" in (tmp_path / "out" / "summary.md").read_text()


def test_a_model_of_the_users_own_is_fine_tuned(tmp_path, small_base, data, records):
    recipe = BaseModelRecipe(vocabulary_size=400, hidden_size=32, n_steps=1, n_positions=64, block_length=32)
    trained = train_base_model(records, seed=1, recipe=recipe)
    trained.model.save_pretrained(tmp_path / "model")
    trained.tokenizer.save_pretrained(tmp_path / "model")
    settings = DemoSettings(
        model=str(tmp_path / "model"),
        data=data,
        output_dir=tmp_path / "out",
        n_epochs=1,
        n_train=40,
        n_members=20,
        n_non_members=40,
        max_length=16,
    )

    histories, _ = show(settings)

    assert [len(history) for history in histories.values()] == [2, 2]
    assert str(tmp_path / "model") in (tmp_path / "out" / "summary.md").read_text()


def test_a_model_that_is_not_there_gets_one_clear_line(tmp_path, data):
    with pytest.raises(ConfigurationError, match="No causal language model with a tokenizer at 'no/such'"):
        show(DemoSettings(model="no/such", data=data, output_dir=tmp_path))


def test_a_file_with_too_few_records_says_how_many_it_holds(tmp_path, small_base):
    path = tmp_path / "few.txt"
    path.write_text("One short record.\n\nAnother short record.\n")

    with pytest.raises(TooFewCanariesError, match=r"few\.txt holds 2 records, at least 30 are needed"):
        show(DemoSettings(data=path, output_dir=tmp_path / "out"))


def audited(decision, **changes):
    return AuditResult(
        step=8,
        epoch=1.0,
        is_baseline=False,
        score="ez",
        n_members=10,
        n_non_members=10,
        decision=decision,
        **changes,
    )


def test_a_run_with_a_failed_audit_is_not_said_to_have_stayed_within_its_budget():
    decision = Decision(False, None, "the audit failed: leakage is unknown")
    failed = audited(decision, status="failed", error="NonFiniteLogitsError: diverged")

    conclusion = demo._conclusion(LORA, AuditHistory((failed,)))

    assert "1 of 1 audits failed; at those points leakage is unknown" in conclusion
    assert "within the budget" not in conclusion


def test_names_of_files_steer_no_terminal_and_are_no_markup(tmp_path, monkeypatch, data):
    monkeypatch.setattr(demo, "_train_twice", lambda *arguments: {})

    _, printed = show(DemoSettings(data=data, output_dir=Path("a\x1b[31m[bold]b")))

    assert r"a\x1b[31m[bold]b" in printed
    assert "\x1b" not in printed


def test_a_run_without_a_verdict_is_not_said_to_have_stayed_within_its_budget():
    unjudged = audited(
        Decision(False, None, "AUC cannot be judged any more"),
        status="ok",
        metrics={
            "auc": Measurement(0.6, note="no interval"),
            "tpr_at_fpr_0.01": Measurement(None, note="no"),
        },
        non_member_loss=3.0,
    )

    assert demo._cells(unjudged, train_loss=2.0)[-1] == "AUC cannot be judged any more"
    assert demo._conclusion(LORA, AuditHistory((unjudged,))).endswith("ended without a verdict.")
