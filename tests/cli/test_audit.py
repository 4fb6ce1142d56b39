import json
import shutil
from dataclasses import replace
from typing import get_args

import pytest
from command_line import ezmia, write_jsonl
from post_hoc_runs import BATCH_SIZE
from tiny import make_texts

from ezmia_callbacks import AuditHistory, post_hoc
from ezmia_callbacks.cli.audit import Precision
from ezmia_callbacks.functional.budget import Decision
from ezmia_callbacks.post_hoc import models

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
)


def audit_arguments(run, folder=None):
    return [
        "audit",
        folder or run.folder,
        "--base",
        run.base,
        "--canaries",
        run.canaries_file,
        "--device",
        "cpu",
        "--batch-size",
        BATCH_SIZE,
    ]


def test_a_run_is_audited_checkpoint_by_checkpoint(run, call, tmp_path):
    code, out, _ = call(*audit_arguments(run), "--output-dir", tmp_path / "out")

    assert code == 0
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(("base model", "checkpoint-"))]
    assert rows == ["base", "checkpoint-15", "checkpoint-30", "checkpoint-45", "checkpoint-60"]
    value = run.history[-1].metrics["auc"].value
    assert f"{value:.3f} [" in out
    assert "No budget was given" in out
    saved = AuditHistory.load(tmp_path / "out" / "history.jsonl")
    assert saved[-1].metrics == run.history[-1].metrics


@pytest.mark.parametrize(
    ("limit", "code", "verdict"), [("0.51", 1, "over_budget"), ("0.99", 0, "within_budget")]
)
def test_json_carries_the_verdict_and_nothing_else_stands_beside_it(limit, code, verdict, run, call):
    arguments = [*audit_arguments(run, run.folder / "checkpoint-60"), "--max-auc", limit, "--rule", "point"]

    got, out, err = call(*arguments, "--json")

    content = json.loads(out)
    assert (got, content["exit_code"], content["verdict"]) == (code, code, verdict)
    assert content["checkpoints"] == [
        {"path": str(run.folder / "checkpoint-60"), "step": 60, "is_within_budget": code == 0}
    ]
    (told,) = content["report"]["runs"]
    assert told["audits"][-1]["metrics"]["auc"]["value"] == run.history[-1].metrics["auc"].value
    assert "drawn at random" in told["about"]
    assert all(line.startswith("ezmia: warning: ") for line in err.splitlines())


@pytest.fixture
def damaged(run, tmp_path):
    """A run of two checkpoints, the weights of the first of which cannot be read."""
    for name in ("checkpoint-45", "checkpoint-60"):
        shutil.copytree(run.folder / name, tmp_path / name)
    (tmp_path / "checkpoint-45" / "model.safetensors").write_bytes(b"half of a file")
    return tmp_path


def test_a_checkpoint_that_cannot_be_audited_is_exit_code_three(run, call, damaged):
    code, out, err = call(*audit_arguments(run, damaged), "--max-auc", "0.99", "--rule", "point")

    assert code == 3
    assert "1 of 2 checkpoints could not be audited: leakage there is unknown" in out
    assert "FAILED" in out
    assert "Traceback" not in err


def test_every_precision_of_an_audit_can_be_asked_for():
    assert [precision.value for precision in Precision] == list(get_args(models.Precision))


def test_over_budget_weighs_more_than_a_gap(run, call, damaged):
    code, out, _ = call(*audit_arguments(run, damaged), "--max-auc", "0.51", "--rule", "point")

    assert code == 1
    assert "OVER BUDGET: checkpoint-60; none is within it. 1 of 2 checkpoints" in out


def unjudged(history):
    """The same history, with no verdict on its last checkpoint."""
    decision = Decision(False, None, "AUC cannot be judged any more: the run was to end by now")
    results = (*history.results[:-1], replace(history[-1], decision=decision))
    return replace(history, results=results)


@pytest.mark.parametrize(("limit", "code"), [("0.99", 3), ("0.51", 1)])
def test_a_checkpoint_without_a_verdict_is_not_within_budget(limit, code, run, call, monkeypatch):
    audit_checkpoints = post_hoc.audit_checkpoints
    monkeypatch.setattr(
        post_hoc, "audit_checkpoints", lambda *args, **kwargs: unjudged(audit_checkpoints(*args, **kwargs))
    )
    arguments = [*audit_arguments(run), "--max-auc", limit, "--rule", "point"]

    got, out, _ = call(*arguments)
    got_json, out_json, _ = call(*arguments, "--json")

    assert got == got_json == code
    assert "No verdict on checkpoint-60, which does not mean within budget." in out
    assert "checkpoints are within budget" not in out
    (row,) = [line for line in out.splitlines() if line.startswith("checkpoint-60 ")]
    assert row.endswith("AUC cannot be judged any more: the run was to end by now")
    content = json.loads(out_json)
    assert (content["exit_code"], content["verdict"]) == (code, "unknown" if code == 3 else "over_budget")
    assert content["checkpoints"][-1]["is_within_budget"] is None


def test_files_of_the_user_are_audited_but_never_called_random(run, call, tmp_path):
    texts = make_texts(60, seed=4)
    members = tmp_path / "members.csv"
    members.write_text("body\n" + "".join(f"{text}\n" for text in texts[:30]))
    others = write_jsonl(tmp_path / "others.jsonl", [{"body": text} for text in texts[30:]])

    code, out, _ = call(
        *("audit", run.folder / "checkpoint-60", "--base", run.base, "--device", "cpu"),
        *("--members", members, "--non-members", others, "--text-column", "body"),
    )

    assert code == 0
    assert "30 members and 30 non-members, taken from two lists" in out
    assert "not randomized" in out


def test_the_command_works_in_a_shell_and_is_quiet_in_a_pipe(run):
    outcome = ezmia(*map(str, audit_arguments(run, run.folder / "checkpoint-60")), "--json")

    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["verdict"] == "no_budget"
    assert all(line.startswith("ezmia: warning: ") for line in outcome.stderr.splitlines())


def bad_audits(run, folder):
    texts = [{"text": text} for text in make_texts(60)]
    few = write_jsonl(folder / "few.jsonl", texts[:3])
    some = write_jsonl(folder / "some.jsonl", texts[10:])
    odd = write_jsonl(folder / "odd.jsonl", [{"body": "a"}])
    listed = folder / "listed.json"
    listed.write_text(json.dumps(texts))
    model = ["audit", run.folder, "--base", run.base, "--device", "cpu"]
    drawn = ["--canaries", run.canaries_file]
    return {
        "no canaries": (model, "either --canaries FILE, or both --members FILE and --non-members FILE"),
        "one side": ([*model, "--members", some], "either --canaries FILE"),
        "data for canaries": ([*model, "--canaries", some], "some.jsonl' is a file of records"),
        "a list for canaries": ([*model, "--canaries", listed], "listed.json' is a file of records"),
        "canaries for data": (
            [*model, "--members", run.canaries_file, "--non-members", some],
            "canaries.json' holds canaries, which `ezmia audit` takes as --canaries",
        ),
        "no file": ([*model, "--canaries", folder / "no.json"], "no.json"),
        "no column": ([*model, "--members", odd, "--non-members", some], "odd.jsonl', row 1: no column"),
        "wrong column": (
            [*model, "--members", some, "--non-members", some, "--text-column", "body"],
            "no column 'body'; it has the columns 'text'",
        ),
        "too few": ([*model, "--members", few, "--non-members", some], "at least 10 of each are needed"),
        "overlap": ([*model, "--members", some, "--non-members", some], "both a member and a non-member"),
        "too few for the budget": (
            [*model, *drawn, "--max-tpr", "0.1"],
            "needs at least 712 non-members, got 60",
        ),
        "two budgets": ([*model, *drawn, "--max-auc", "0.6", "--max-tpr", "0.1"], "both given"),
        "no budget": ([*model, *drawn, "--max-auc", "0.4"], "strictly between 0.5 (chance) and 1, got 0.4"),
        "no run": (["audit", folder / "nowhere", *drawn, "--base", run.base], "There is no folder"),
        "no model": (["audit", folder, *drawn, "--base", run.base], "holds no model"),
        "no base": (["audit", run.folder, *drawn], "does not say which model it was trained from"),
        "wrong base": (
            ["audit", run.folder, *drawn, "--base", "no/such-model"],
            "'no/such-model' cannot be loaded as the base model",
        ),
        "wrong device": ([*model[:-1], "abacus", *drawn], "no device 'abacus'"),
        "wrong score": (
            [*model, *drawn, "--score", "magic"],
            "Unknown --score 'magic': use strongest, or one of ez,",
        ),
    }


def test_bad_input_to_an_audit_is_one_line_and_exit_code_two(run, call, tmp_path):
    for name, (arguments, message) in bad_audits(run, tmp_path).items():
        code, out, err = call(*arguments)

        assert (code, out) == (2, ""), name
        assert err.startswith("ezmia: "), name
        assert err.count("\n") == 1, (name, err)
        assert message in err, name
