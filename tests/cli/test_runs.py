import json
from pathlib import Path

import pytest
from command_line import refusal

from ezmia_callbacks import AuditHistory
from ezmia_callbacks.cli import runs as runs_module

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
)


@pytest.fixture
def runs(run, tmp_path):
    for name in ("one", "two"):
        run.history.save(tmp_path / name / "_privacy_audit" / "history.jsonl")
    return tmp_path / "one", tmp_path / "two"


def run_auc(folder):
    return AuditHistory.load(folder / "_privacy_audit" / "history.jsonl")[-1].metrics["auc"].value


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
    code, out, err = call("report", runs[0] / "_privacy_audit" / "history.jsonl")
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
    assert out.startswith("No run has a budget: ")
    assert "kept" in out
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


def test_two_histories_in_one_folder_are_not_guessed_between(runs, call):
    code, _, err = call("report", runs[0].parent)

    assert code == 2
    assert "There are 2 histories in" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "OUT"], "is not an audit history"),
        (["report", "DATA"], "is not an audit history"),
        (["compare", "DATA"], "at least two runs"),
        (["compare", "DATA", "DATA"], "given twice"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, call, data, tmp_path):
    places = {"DATA": data, "OUT": tmp_path / "out"}

    err = refusal(call(*(places.get(argument, argument) for argument in arguments)))

    assert message in err


def edited(folder, step, **claims):
    """The history of a run with what one audit decided changed by hand."""
    path = folder / "_privacy_audit" / "history.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:]:
        if row["step"] == step:
            row["decision"].update(claims)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def over(run, call, tmp_path):
    """A run that `ezmia audit` found over its budget, twice."""
    for name in ("one", "two"):
        code, _, _ = call(
            *("audit", run.folder / "checkpoint-60", "--base", run.base, "--canaries", run.canaries_file),
            *("--max-auc", "0.51", "--rule", "point", "--device", "cpu"),
            *("-o", tmp_path / name / "_privacy_audit"),
        )
        assert code == 1
    return tmp_path / "one", tmp_path / "two"


def test_a_verdict_that_was_edited_does_not_reach_a_report(over, call, tmp_path):
    path = edited(over[0], 60, is_within_budget=True, message="within budget: AUC 0.500 <= 0.510")
    page = tmp_path / "r.html"

    _, markdown, err = call("report", over[0])
    _, document, _ = call("report", over[0], "--json")
    call("report", over[0], "-o", page)

    assert "within budget: AUC 0.500" not in [cell.strip() for cell in markdown.split("|")]
    assert "The file says 'within budget' where the figures say 'over budget: AUC" in markdown
    assert json.loads(document)["runs"][0]["outcome"]["kind"] == "over budget"
    assert "The file says" in page.read_text()
    assert err.startswith(f"ezmia: warning: {path}, epoch 4: The file says 'within budget'")


def test_a_verdict_that_was_edited_does_not_reach_a_comparison(over, call):
    edited(over[0], 60, is_within_budget=True, message="within budget: AUC 0.500 <= 0.510")

    code, out, err = call("compare", *over)

    rows = [line for line in out.splitlines() if line.startswith(("one ", "two "))]
    assert code == 0
    assert len(rows) == 2
    assert all(" over budget " in row for row in rows)
    assert out.startswith("None of the 2 runs has left trained weights within its budget.")
    assert "one, epoch 4: The file says 'within budget' where the figures say" in out
    assert err.count("The file says") == 1
