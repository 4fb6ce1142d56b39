import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest
from command_line import ezmia, run_main
from post_hoc_runs import BATCH_SIZE, finish_run
from tiny import make_texts

import ezmia_callbacks
from ezmia_callbacks import AuditHistory
from ezmia_callbacks.canaries.files import load_canaries
from ezmia_callbacks.cli import doctor as doctor_module
from ezmia_callbacks.cli import runs as runs_module
from ezmia_callbacks.cli.audit import Precision
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.functional.planning import canaries_needed
from ezmia_callbacks.post_hoc import audit as post_hoc

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finish_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def call(monkeypatch):
    return lambda *arguments: run_main(monkeypatch, *arguments)


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


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path):
    rows = [{"id": i, "text": text} for i, text in enumerate(make_texts(120))]
    return write_jsonl(tmp_path / "data.jsonl", rows)


# audit


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


def test_a_checkpoint_that_cannot_be_audited_is_exit_code_three(run, call, tmp_path):
    for name in ("checkpoint-45", "checkpoint-60"):
        shutil.copytree(run.folder / name, tmp_path / name)
    (tmp_path / "checkpoint-45" / "model.safetensors").write_bytes(b"half of a file")

    code, out, err = call(*audit_arguments(run, tmp_path), "--max-auc", "0.99", "--rule", "point")

    assert code == 3
    assert "1 of 2 checkpoints could not be audited: leakage there is unknown" in out
    assert "FAILED" in out
    assert "Traceback" not in err


def test_every_precision_of_an_audit_can_be_asked_for():
    assert [precision.value for precision in Precision] == list(get_args(post_hoc.Precision))


def test_over_budget_weighs_more_than_a_gap(run, call, tmp_path):
    for name in ("checkpoint-45", "checkpoint-60"):
        shutil.copytree(run.folder / name, tmp_path / name)
    (tmp_path / "checkpoint-45" / "model.safetensors").write_bytes(b"half of a file")

    code, out, _ = call(*audit_arguments(run, tmp_path), "--max-auc", "0.51", "--rule", "point")

    assert code == 1
    assert "OVER BUDGET: checkpoint-60; none is within it. 1 of 2 checkpoints" in out


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


# bad input


def bad_audits(run, folder):
    texts = [{"text": text} for text in make_texts(60)]
    few = write_jsonl(folder / "few.jsonl", texts[:3])
    some = write_jsonl(folder / "some.jsonl", texts[10:])
    odd = write_jsonl(folder / "odd.jsonl", [{"body": "a"}])
    model = ["audit", run.folder, "--base", run.base, "--device", "cpu"]
    drawn = ["--canaries", run.canaries_file]
    return {
        "no canaries": (model, "either --canaries FILE, or both --members FILE and --non-members FILE"),
        "one side": ([*model, "--members", some], "either --canaries FILE"),
        "no file": ([*model, "--canaries", folder / "no.json"], "no.json"),
        "no column": ([*model, "--members", odd, "--non-members", some], "odd.jsonl', row 1: no column"),
        "wrong column": (
            [*model, "--members", some, "--non-members", some, "--text-column", "body"],
            "no column 'body'; it has ['text']",
        ),
        "too few": ([*model, "--members", few, "--non-members", some], "at least 10 of each are needed"),
        "overlap": ([*model, "--members", some, "--non-members", some], "member and non-member at once"),
        "too few for the budget": (
            [*model, *drawn, "--max-tpr", "0.1"],
            "needs at least 574 non-members, got 60",
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
        "wrong score": ([*model, *drawn, "--score", "magic"], "Unknown score 'magic'"),
    }


def test_bad_input_to_an_audit_is_one_line_and_exit_code_two(run, call, tmp_path):
    for name, (arguments, message) in bad_audits(run, tmp_path).items():
        code, out, err = call(*arguments)

        assert (code, out) == (2, ""), name
        assert err.startswith("ezmia: "), name
        assert err.count("\n") == 1, (name, err)
        assert message in err, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "A plan needs a budget"),
        (["plan", "--max-auc", "0.6", "--expected", "0.55"], "`expected` is 0.55"),
        (["plan", "--max-auc", "0.6", "--audits", "0"], "`n_audits` is 0"),
        (["split", "DATA", "-o", "OUT"], "--members and --non-members, or --coins alone"),
        (["split", "DATA", "-o", "OUT", "--members", "50", "--non-members", "50", "--coins", "60"], "alone"),
        (["split", "DATA", "-o", "OUT", "--members", "100", "--non-members", "50"], "only 120 of 120 rows"),
        (["split", "DATA", "-o", "OUT", "--coins", "10"], "at least 50 are needed"),
        (["split", "DATA", "-o", "OUT", "--coins", "60", "--text-column", "body"], "no column 'body'"),
        (["split", "nowhere.jsonl", "-o", "OUT", "--coins", "60"], "Cannot read 'nowhere.jsonl'"),
        (["split", "DATA", "-o", "DATA", "--coins", "60"], "data.jsonl"),
        (["report", "OUT"], "is not an audit history"),
        (["report", "DATA"], "is not an audit history"),
        (["compare", "DATA"], "at least two runs"),
        (["compare", "DATA", "DATA"], "given twice"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, call, data, tmp_path):
    places = {"DATA": data, "OUT": tmp_path / "out"}

    code, out, err = call(*(places.get(argument, argument) for argument in arguments))

    assert (code, out) == (2, "")
    assert err.startswith("ezmia: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert not (tmp_path / "out" / "train.jsonl").exists()


# split


def test_a_split_leaves_all_lines_but_the_non_members_as_they_were(call, data, tmp_path):
    code, out, err = call("split", data, "--members", 20, "--non-members", 30, "-o", tmp_path / "out")

    assert (code, err) == (0, "")
    canaries = load_canaries(tmp_path / "out" / "canaries.json")
    assert (canaries.n_members, canaries.n_non_members) == (20, 30)
    assert canaries.provenance.is_randomized
    held_out = {r["text"] for r, m in zip(canaries.records, canaries.is_member, strict=True) if not m}
    lines = data.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["text"] not in held_out]
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == b"".join(kept)
    assert len(kept) == 90
    assert "90 of 120 rows" in out


def test_a_split_can_be_drawn_again_and_differs_by_its_seed(call, data, tmp_path):
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, out, _ = call("split", data, "--coins", 60, "--seed", seed, "-o", tmp_path / name, "--json")
        assert code == 0
        drawn[name] = json.loads(out)

    assert drawn["a"]["fingerprint"] == drawn["b"]["fingerprint"] != drawn["c"]["fingerprint"]
    assert drawn["a"]["n_members"] + drawn["a"]["n_non_members"] == 60
    for file in ("train.jsonl", "canaries.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert load_canaries(tmp_path / "a" / "canaries.json").provenance.has_independent_coins


def test_a_split_is_not_overwritten_unless_told_to(call, data, tmp_path):
    arguments = ["split", data, "--coins", 60, "-o", tmp_path / "out"]
    call(*arguments)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()

    refused = call(*arguments, "--seed", 5)
    still = (tmp_path / "out" / "train.jsonl").read_bytes()
    forced = call(*arguments, "--seed", 5, "--force")

    assert (refused[0], forced[0]) == (2, 0)
    assert "--force" in refused[2]
    assert still == before != (tmp_path / "out" / "train.jsonl").read_bytes()


def test_a_split_never_overwrites_its_source(call, tmp_path):
    rows = [{"text": text} for text in make_texts(120)]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    before = data.read_bytes()

    code, _, err = call("split", data, "--coins", 60, "-o", tmp_path, "--force")

    assert code == 2
    assert "is the file to be split" in err
    assert data.read_bytes() == before


def test_a_csv_is_split_by_the_column_that_is_named(call, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("id,body\n" + "".join(f'{i},"{text},"\n' for i, text in enumerate(make_texts(80))))

    code, _, err = call("split", data, "--coins", 60, "-o", tmp_path / "out", "--text-column", "body")

    assert (code, err) == (0, "")
    canaries = load_canaries(tmp_path / "out" / "canaries.json")
    assert all(record.endswith(",") for record in canaries.records)
    kept = (tmp_path / "out" / "train.csv").read_text().splitlines()
    assert kept[0] == "id,body"
    assert len(kept) == 81 - canaries.n_non_members


# plan


def test_a_plan_says_what_the_library_says(call):
    plan = canaries_needed(LeakageBudget(limit=0.6), n_audits=10, expected=0.7, power=0.8)

    code, out, err = call("plan", "--max-auc", 0.6, "--audits", 10, "--expected", 0.7, "--power", 0.8)
    _, content, _ = call("plan", "--max-auc", 0.6, "--audits", 10, "--expected", 0.7, "--json")

    assert (code, err) == (0, "")
    assert plan.describe() in out
    assert "0.7 " in out
    content = json.loads(content)
    assert (content["n_members"], content["text"]) == (plan.n_members, plan.describe())
    assert {"expected": 0.7, "power": 0.8, "n_members": 210, "n_non_members": 210} in content["alternatives"]


@pytest.mark.parametrize("rule", ["lower", "upper", "point"])
def test_every_rule_can_be_planned(rule, call):
    code, out, _ = call("plan", "--max-auc", 0.7, "--rule", rule)

    assert code == 0
    assert "50 % chance" in out


# report and compare


@pytest.fixture
def runs(run, tmp_path):
    for name in ("one", "two"):
        run.history.save(tmp_path / name / "privacy_audit" / "history.jsonl")
    return tmp_path / "one", tmp_path / "two"


def test_a_report_is_written_by_the_ending_of_its_file(runs, call, tmp_path):
    names = ["r.html", "r.md", "r.json", "r.png", "r.svg"]
    outputs = [argument for name in names for argument in ("-o", tmp_path / name)]

    code, _, err = call("report", runs[0], *outputs)

    assert (code, err) == (0, "")
    contents = {name: (tmp_path / name).read_bytes() for name in names}
    assert b"<html" in contents["r.html"]
    assert contents["r.md"].startswith(b"## Membership leakage")
    assert json.loads(contents["r.json"])["runs"]
    assert contents["r.png"].startswith(b"\x89PNG")
    assert b"<svg" in contents["r.svg"]


def test_a_report_goes_to_standard_output_without_a_file(runs, call):
    code, out, err = call("report", runs[0] / "privacy_audit" / "history.jsonl")
    _, content, _ = call("report", runs[0], "--json")

    assert (code, err) == (0, "")
    assert out.startswith("## Membership leakage")
    assert json.loads(content)["runs"][0]["n_members"] == 40


@pytest.mark.parametrize("name", ["r.docx", "report"])
def test_an_unknown_ending_is_refused(name, runs, call, tmp_path):
    code, _, err = call("report", runs[0], "-o", tmp_path / name)

    assert code == 2
    assert "must end in .html, .md" in err


def test_runs_stand_side_by_side(runs, call, tmp_path):
    code, out, err = call("compare", *runs, "-o", tmp_path / "c.html", "-o", tmp_path / "c.png")
    _, content, _ = call("compare", *runs, "--json")

    value = run_auc(runs[0])
    assert (code, err) == (0, "")
    assert "final AUC [band]" in out
    assert (
        sum(line.startswith(("one ", "two ")) and f"{value:.3f} [" in line for line in out.splitlines()) == 2
    )
    assert {r["label"] for r in json.loads(content)["runs"]} == {"one", "two"}
    assert (tmp_path / "c.html").is_file()
    assert (tmp_path / "c.png").is_file()


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/a/full/run", "/a/lora/run"], ["full", "lora"]),
        (["/a/one", "/a/two/deeper"], ["one", "two/deeper"]),
        (["/a/run", "/a/x/run"], ["run", "x/run"]),
        (["/a/b", "/a/b/c"], ["b", "b/c"]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(paths, labels):
    assert runs_module._labels([Path(path) for path in paths]) == labels


def run_auc(folder):
    return AuditHistory.load(folder / "privacy_audit" / "history.jsonl")[-1].metrics["auc"].value


def test_two_histories_in_one_folder_are_not_guessed_between(runs, call):
    code, _, err = call("report", runs[0].parent)

    assert code == 2
    assert "There are 2 histories in" in err


# doctor


def test_the_doctor_finds_this_environment_well(call, tmp_path):
    code, out, err = call("doctor", "--folder", tmp_path)
    content = json.loads(call("doctor", "--folder", tmp_path, "--json")[1])

    assert (code, err) == (0, "")
    assert "All is well." in out
    found = {check["name"]: check for check in content["checks"]}
    assert content["is_well"]
    assert found["torch"]["found"] == metadata.version("torch")
    assert found["self-test"]["found"].startswith("AUC 0.500 before training, ")
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_names_what_has_to_be_mended(call, tmp_path, monkeypatch):
    versions = {"torch": "1.13.1", "transformers": None, "tqdm": None}
    real = metadata.version

    def version(name):
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(doctor_module.metadata, "version", version)
    (tmp_path / "file").touch()

    code, out, err = call("doctor", "--folder", tmp_path / "file" / "folder")

    assert (code, err) == (3, "")
    assert "To be mended: torch, tqdm, folder." in out
    assert "2.4 or newer is needed: pip install -U torch" in out
    assert 'pip install "ezmia-callbacks[huggingface]"' in out


@pytest.mark.parametrize(
    ("version", "minimum", "is_old"),
    [
        ("2.4.0+cpu", "2.4", False),
        ("2.13.0", "2.4", False),
        ("2.3.9", "2.4", True),
        ("4.46.dev0", "4.46", False),
    ],
)
def test_versions_are_compared_as_numbers(version, minimum, is_old):
    assert (doctor_module._release(version) < doctor_module._release(minimum)) == is_old


def test_the_doctor_knows_the_versions_that_the_package_asks_for():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((Path(ezmia_callbacks.__file__).parents[1] / "pyproject.toml").read_text())[
        "project"
    ]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [
        one for name in extras if name not in ("all", "dev") for one in extras[name]
    ]
    named = dict(one.split(">=") for one in asked)

    assert {name: doctor_module.MINIMUM_VERSIONS.get(name) for name in named} == named
    assert {one.split(">=")[0] for one in project["dependencies"]} == set(doctor_module.REQUIRED)


def test_help_loads_no_framework():
    code = (
        "import sys\nfrom ezmia_callbacks.cli import command\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )

    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert outcome.stdout == "[]\n"


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
    assert "No verdict on checkpoint-60: that is not within budget." in out
    assert "checkpoints are within budget" not in out
    (row,) = [line for line in out.splitlines() if line.startswith("checkpoint-60 ")]
    assert row.endswith("AUC cannot be judged any more: the run was to end by now")
    content = json.loads(out_json)
    assert (content["exit_code"], content["verdict"]) == (code, "unknown" if code == 3 else "over_budget")
    assert content["checkpoints"][-1]["is_within_budget"] is None


def test_a_module_that_is_run_answers_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ezmia_callbacks.cli.command", "plan", "--no-such-option"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "no-such-option" in done.stderr
