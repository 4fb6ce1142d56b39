"""What comes from files and errors is inert wherever it is shown."""

import io
import json
import logging
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import markdown_it
import pytest
from command_line import run_main

import ezmia_callbacks
from ezmia_callbacks import AuditHistory, AuditResult, LeakageBudget
from ezmia_callbacks.functional import Decision, Interval
from ezmia_callbacks.report import (
    plot_leakage_and_loss,
    plot_leakage_curve,
    render_report,
    summarize,
    to_document,
    write_json,
    write_report,
)
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import Finding, Measurement
from ezmia_callbacks.safe_text import describe_columns, for_document, for_terminal, get_logger

PACKAGE = Path(ezmia_callbacks.__file__).parent

PAYLOADS = [
    "\x1b[2J\x1b[31mred\x1b[0m",
    "\x1b]8;;https://evil.example\x07click\x1b]8;;\x07",
    "\x1b]0;title\x1b\\",
    "\x9b31m\x85\x9d8;;x\x9c",
    "within budget\rOVER BUDGET",
    "secret\b\b\b\b\b\bpublic\x7f",
    "\u202etegdub nihtiw\u202c \u2066a\u2069 \u200f\u061c",
    "a\u2028b\u2029c",
    "\x00\ud800\udfff\ufffe\uffff\ufdd0\U0001fffe",
    "\U000e0041\U000e0042\ufeff",
]
EVERYTHING = " ".join(PAYLOADS)

# All that may not reach a terminal, said in another way than in the package.
STEERING = re.compile(
    "[" + "".join(re.escape(chr(c)) for c in [*range(9), *range(11, 32), *range(127, 160)]) + "]"
    "|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ufdd0]|[\ud800-\udfff]|[\U000e0000-\U000e007f]"
)


def hostile_history(text, *, score="ez"):
    band = Interval(0.5, 0.7, 0.95, "delong")
    measured = Measurement(0.6, band, band, note=text)
    finding = Finding(text, True, text)
    base = AuditResult(
        step=0,
        epoch=0.0,
        status="ok",
        is_baseline=True,
        score=score,
        n_members=20,
        n_non_members=30,
        decision=Decision(False, True, text),
        metrics={"auc": measured, text: Measurement(None, note=text)},
        auc_by_score={text: measured},
        auc_by_group={text: measured},
        findings=(finding,),
        member_loss=1.0,
        non_member_loss=1.1,
    )
    failed = replace(base, step=5, epoch=1.0, is_baseline=False, status="failed", metrics={}, error=text)
    last = replace(
        base, step=10, epoch=2.0, is_baseline=False, decision=Decision(True, False, text, 0.6, 0.5)
    )
    return AuditHistory(
        (base, failed, last),
        LeakageBudget(limit=0.55),
        about=text,
        findings=(finding,),
        caveat=text,
        run_metadata=RunMetadata(command=text, others={text: text}),
        is_complete=True,
    )


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_steers_a_terminal_is_written_in_plain_letters(payload):
    assert STEERING.search(payload)

    shown = for_terminal(f"before {payload} after\n\tünï שלום 文 😀")

    assert not STEERING.search(shown)
    assert shown.startswith("before ")
    assert shown.endswith(" after\n\tünï שלום 文 😀")


@pytest.mark.parametrize("payload", [*PAYLOADS, EVERYTHING])
@pytest.mark.parametrize("outputs", [[], ["-o", "page.md"]])
def test_no_command_on_a_run_lets_a_terminal_be_steered(payload, outputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile_history(payload).save(tmp_path / "one" / "history.jsonl")
    # What a name of a folder can hold: no NUL, no slash; bytes that are no UTF-8 read as lone surrogates.
    name = re.sub("[\x00/]|[\ud800-\udfff]", "\udcff", f"two {payload}")
    folder = tmp_path / name
    hostile_history(payload, score=payload).save(folder / "history.jsonl")

    for command in (
        ["report", "one", *outputs],
        ["report", str(folder), *outputs],
        ["compare", "one", folder],
    ):
        code, out, err = run_main(monkeypatch, *command)
        assert code == 0, err
        assert not STEERING.search(out + err)
    code, out, err = run_main(monkeypatch, "report", str(folder / "missing"))
    assert code == 2
    assert not STEERING.search(out + err)


def test_errors_that_quote_a_file_steer_no_terminal(tmp_path, monkeypatch):
    history = tmp_path / "history.jsonl"
    hostile_history("x").save(history)
    history.write_text(history.read_text().replace('"caveat"', json.dumps(EVERYTHING)))

    code, out, err = run_main(monkeypatch, "report", history)

    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert not STEERING.search(err)


def test_a_crash_and_a_usage_error_steer_no_terminal(tmp_path, monkeypatch):
    from ezmia_callbacks.cli import command
    from ezmia_callbacks.cli.terminal import say_all

    def crash(*_, **__):
        raise RuntimeError(EVERYTHING)

    def crash_and_say_all(*_, **__):
        say_all()
        raise RuntimeError(EVERYTHING)

    for each in (crash, crash_and_say_all):
        monkeypatch.setattr(command, "app", each)
        code, _, err = run_main(monkeypatch, "report", "x")
        assert code == 3
        assert not STEERING.search(err)
    assert "Traceback" in err

    monkeypatch.undo()
    code, _, err = run_main(monkeypatch, "report", "x", f"--{PAYLOADS[0]}")
    assert code == 2
    assert not STEERING.search(err)


def test_log_lines_that_quote_data_steer_no_terminal_whoever_shows_them():
    stream = io.StringIO()
    logger = get_logger("ezmia_callbacks.of_a_test")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        error = ValueError(EVERYTHING)
        logger.warning("%s of %s at %d: %s", EVERYTHING, Path("a\x1b[2J"), 3, error, exc_info=error)
    finally:
        logger.removeHandler(handler)

    assert not STEERING.search(stream.getvalue())
    assert " at 3: " in stream.getvalue()


def test_what_is_put_into_a_log_line_cannot_pass_for_another(caplog):
    logger = get_logger("ezmia_callbacks.of_a_test")

    logger.warning("%s and %s at\n%d", "a\nWARNING: b", ValueError("c\r\nd"), 3)

    assert caplog.messages == ["a\\nWARNING: b and c\\nd at\n3"]


def test_every_module_logs_through_the_logger_that_makes_texts_safe():
    own = {"safe_text.py", "console.py", "terminal.py", "run.py"}
    others = [
        path
        for path in PACKAGE.rglob("*.py")
        if path.name not in own and "logging.getLogger(" in path.read_text("utf-8")
    ]

    assert others == []


def test_a_line_on_the_console_of_a_script_steers_no_terminal():
    from ezmia_callbacks.console import _TqdmHandler

    handler, stream = _TqdmHandler(), io.StringIO()
    with redirect_stderr(stream), redirect_stdout(io.StringIO()):
        handler.emit(logging.LogRecord("a", logging.WARNING, "", 0, EVERYTHING, None, None))

    assert stream.getvalue().strip()
    assert not STEERING.search(stream.getvalue())


INVALID = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0\ufffe\uffff\U0001fffe]|[\ud800-\udfff]")


def test_pages_and_documents_hold_characters_alone(tmp_path):
    history = hostile_history(EVERYTHING, score=EVERYTHING)
    runs = {EVERYTHING: history, "other": hostile_history("x")}

    write_report(runs, tmp_path / "page.html", title=EVERYTHING)
    write_json(runs, tmp_path / "page.json", title=EVERYTHING)

    page = (tmp_path / "page.html").read_text("utf-8")
    texts = json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert not INVALID.search(page)
    assert not INVALID.search(json.dumps(texts, ensure_ascii=False).replace("\n", " "))
    assert page == render_report(texts)
    assert "\N{REPLACEMENT CHARACTER}" in page


def test_a_page_of_a_document_from_elsewhere_holds_characters_alone():
    document = to_document(hostile_history("x"))
    document["runs"][0]["caveat"] = EVERYTHING

    assert not INVALID.search(render_report(document))


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning")
@pytest.mark.parametrize("label", ["a$b$", r"$\frac{$", *PAYLOADS])
def test_pictures_show_labels_as_they_are(label, tmp_path):
    from matplotlib import pyplot

    runs = {label: hostile_history(label, score=label), "other": hostile_history("x")}

    axes = plot_leakage_curve(runs)
    axes.figure.savefig(tmp_path / "curve.svg")
    axes, _ = plot_leakage_and_loss(runs)
    axes.figure.savefig(tmp_path / "both.png")
    pyplot.close("all")


MARKDOWN = [
    "[click](https://evil.example)",
    "![image](https://evil.example/pixel.png)",
    "[click][1] and [1]: https://evil.example",
    "[ref]: https://evil.example",
    "<https://evil.example>",
    "https://evil.example/a_b?c=|d`e",
    "www.evil.example and mailto:a@evil.example and someone@evil.example",
    "<img src=x onerror=alert(1)><script>alert(1)</script><!-- <a href=x>y</a> -->",
    "&lt;b&gt; &#x202e; &#60;script&#62;",
    "a | b || c |",
    "# heading",
    "===",
    "> quote",
    "- item",
    "1. item",
    "1) item",
    "```\ncode\n```",
    "`code` *strong* _em_ ~~gone~~ $x^2$ **b**",
    "line\n\n# heading\n\n| a | b |\n|---|---|",
    "back\\slash \\` \\| \\[a](b)",
    "<x\n>",
]


def rendered(text):

    return (
        markdown_it.MarkdownIt("commonmark", {"linkify": False})
        .enable("table")
        .enable("strikethrough")
        .render(text)
    )


def tags_in(html):
    """All tags in order, but for code, in which addresses stand."""
    return [tag for tag in re.findall(r"<(/?\w+)", html) if tag.strip("/") != "code"]


@pytest.mark.parametrize("payload", [*MARKDOWN, *PAYLOADS, EVERYTHING])
def test_markdown_from_data_is_inert(payload):
    runs = {payload: hostile_history(payload, score=payload), "plain": hostile_history("plain")}

    text = summarize(runs)

    plain = summarize({"plain": hostile_history("plain", score="plain"), "plain 2": hostile_history("plain")})
    assert not STEERING.search(text)
    text.encode()
    html, expected = rendered(text), rendered(plain)
    for tag in (
        "a",
        "img",
        "script",
        "h1",
        "h2",
        "h3",
        "h4",
        "blockquote",
        "table",
        "tr",
        "td",
        "ul",
        "li",
        "ol",
        "pre",
    ):
        assert html.count(f"<{tag}>") + html.count(f"<{tag} ") == expected.count(f"<{tag}>") + expected.count(
            f"<{tag} "
        ), tag
    assert "<hr" not in html
    # Addresses stand in code, of which no reader makes links.
    outside = re.sub(r"<code>.*?</code>", "", html)
    assert not re.search(r"https?://|www\.|mailto:|@evil", outside)


def test_what_is_shown_as_markdown_can_still_be_read():
    text = summarize(hostile_history("AUC 0.651 [0.6, 0.7] of loss_difference, a*b & c < d"))

    assert r"AUC 0.651 [0.6, 0.7] of loss_difference, a\*b & c < d" in text


def test_letters_of_every_script_stay():
    text = "Grüße, Ω, שלום, سلام, नमस्ते, 文字, 👩‍👩‍👧, é"

    assert for_terminal(text) == for_document(text) == text


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], "no columns"),
        (["text", "id"], "the columns 'id', 'text'"),
        (["prompt", "My number is 42", "Ann"], "the columns 'prompt' and 2 with names of their own"),
        (["My number is 42"], "1 column with a name of its own"),
        (["Ann", "Bob", 7, None], "4 columns with names of their own"),
    ],
)
def test_only_names_that_many_datasets_have_are_shown(names, shown):
    assert describe_columns(names) == shown
