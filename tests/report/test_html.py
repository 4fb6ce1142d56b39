import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import html5lib
import pytest
import torch
from example_runs import (
    BUDGET,
    CAVEAT,
    audit,
    epsilon_run,
    exposed_records,
    failure,
    history,
    lora_run,
    stopped_run,
)
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import report
from ezmia_callbacks.audit.auditor import PrivacyAuditor
from ezmia_callbacks.canaries import hold_out_canaries
from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.report import render_report, to_document, write_report
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import Finding, Measurement

CSS = (Path(report.__file__).parent / "templates" / "report.css").read_text("utf-8")
HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"' {{ 7 * 7 }} & ünï"
SEVERAL = {"full fine-tuning": stopped_run(), "LoRA": lora_run()}
HIDDEN = ("style", "title", "desc")


def page(histories, **arguments):
    return render_report(to_document(histories, **arguments))


@cache
def parse(text):
    """The elements of a page; anything that the HTML standard calls an error raises."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def tag(element):
    return element.tag.rpartition("}")[2]


def elements(root, *names):
    return [found for found in root.iter() if isinstance(found.tag, str) and tag(found) in names]


def having(root, name, value):
    return [found for found in root.iter() if value in (found.get(name) or "").split()]


def words(root):
    return " ".join("".join(root.itertext()).split())


def by_id(root, name):
    (found,) = having(root, "id", name)
    return found


PAGES = {
    "stopped": lambda: page(stopped_run()),
    "several": lambda: page(SEVERAL),
    "many": lambda: page({f"run {i}": lora_run() for i in range(7)}),
    "baseline only": lambda: page(history(audit(0, 0.5, (5, 5)))),
    "failed only": lambda: page(history(failure(1))),
    "steps": lambda: page(history(replace(audit(1, 0.6, (5, 5)), epoch=None))),
    "no budget": lambda: page(history(audit(1, 0.6, (5, 5), budget=None), budget=None)),
    "no loss": lambda: page(history(audit(1, 0.6, (None, None)))),
    "bare": lambda: page(
        replace(history(audit(1, 0.6, (5, 5))), findings=(), run_metadata=RunMetadata(), about="", caveat="")
    ),
    "coins": lambda: page(epsilon_run()),
    "exposed": lambda: page(stopped_run(), exposed=exposed_records(), texts={"ticket 17": "a\nb"}),
    "hostile": lambda: page({HOSTILE: stopped_run(), "b": lora_run()}, title=HOSTILE),
}


@pytest.fixture(scope="module", params=PAGES)
def root(request):
    return parse(PAGES[request.param]())


def test_the_page_is_valid_html_with_one_of_each_landmark(root):
    assert root.get("lang") == "en"
    assert {
        name: len(elements(root, name)) for name in ("main", "header", "footer", "nav", "h1")
    } == dict.fromkeys(("main", "header", "footer", "nav", "h1"), 1)
    (viewport,) = having(root, "name", "viewport")
    assert viewport.get("content") == "width=device-width, initial-scale=1"


def test_nothing_is_loaded_and_nothing_runs(root):
    loading = [
        found.get(name) for found in root.iter() for name in ("src", "srcset", "poster", "action", "data")
    ]
    targets = [found.get("href") for found in root.iter() if found.get("href") is not None]

    assert elements(root, "script", "img", "iframe", "object", "embed", "base", "use", "image") == []
    assert set(loading) == {None}
    assert all(target.startswith("#") or target == "data:," for target in targets)
    assert not [name for found in root.iter() for name in found.attrib if str(name).startswith("on")]
    assert "@import" not in CSS
    assert set(re.findall(r"url\((.)", CSS)) <= {"#"}
    (policy,) = having(root, "http-equiv", "Content-Security-Policy")
    assert policy.get("content").startswith("default-src 'none'")


def test_ids_are_unique_and_every_reference_finds_one(root):
    ids = [found.get("id") for found in root.iter() if found.get("id")]
    references = [
        name
        for found in root.iter()
        for attribute in ("aria-labelledby", "aria-describedby")
        for name in (found.get(attribute) or "").split()
    ]
    references += [
        found.get("href")[1:] for found in root.iter() if (found.get("href") or "").startswith("#")
    ]

    assert len(ids) == len(set(ids))
    assert set(references) <= set(ids)


def test_tables_have_captions_and_headers_and_can_be_scrolled_by_keyboard(root):
    scrolled = {table for box in having(root, "class", "scroll") for table in elements(box, "table")}
    for table in elements(root, "table"):
        assert words(elements(table, "caption")[0])
        assert all(cell.get("scope") for cell in elements(table, "th"))
        assert table in scrolled
    for box in having(root, "class", "scroll"):
        assert (box.get("tabindex"), box.get("role")) == ("0", "region")
        assert box.get("aria-label")


def test_headings_never_skip_a_level(root):
    levels = [int(tag(found)[1]) for found in elements(root, "h1", "h2", "h3", "h4", "h5", "h6")]

    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))


def test_drawings_are_described_or_hidden_from_screen_readers(root):
    for drawing in elements(root, "svg"):
        if drawing.get("aria-hidden") == "true":
            assert not having(drawing, "tabindex", "0")
            continue
        assert words(by_id(root, drawing.get("aria-labelledby")))
        assert words(by_id(root, drawing.get("aria-describedby")))
        columns = having(drawing, "class", "column")
        assert columns
        assert all(column.get("tabindex") == "0" and column.get("role") == "img" for column in columns)
        assert all(column.get("aria-label") for column in columns)


def test_the_file_is_the_page_of_its_document_and_of_nothing_else(tmp_path):
    write_report(stopped_run(), tmp_path / "new" / "report.html", title="A title")

    document = json.loads(json.dumps(to_document(stopped_run(), title="A title")))
    assert (tmp_path / "new" / "report.html").read_text("utf-8") == render_report(document)


def numbers(document):
    """Every number of a document, in all the ways in which a page may write it."""
    if isinstance(document, dict):
        return set().union(*map(numbers, document.values()))
    if isinstance(document, list):
        return set().union(*map(numbers, document)) if document else set()
    if isinstance(document, str):
        return set(re.findall(r"\d+(?:[.,]\d+)*", document))
    if isinstance(document, bool) or document is None:
        return set()
    shown = {
        f"{document:.3f}",
        f"{document:.3g}",
        f"{document:g}",
        f"{100 * document:.4g}",
        f"{document:.2f}",
    }
    return shown | ({f"{document:,}"} if isinstance(document, int) else set())


@pytest.mark.parametrize(
    "histories", [stopped_run(), SEVERAL, epsilon_run()], ids=["one", "several", "coins"]
)
def test_every_number_on_the_page_stands_in_the_document(histories):
    document = to_document(histories)
    found = parse(render_report(document))
    drawn = {text for chart in having(found, "class", "chart") for text in elements(chart, "text")}
    labels = [found.get("aria-label") or "" for found in having(found, "class", "column")]
    texts = [
        part.text or ""
        for part in found.iter()
        if part not in drawn and isinstance(part.tag, str) and tag(part) not in HIDDEN
    ]
    texts += [part.tail or "" for part in found.iter()]

    shown = set(re.findall(r"(?<![\w-])\d+(?:[.,]\d+)*", " ".join([*texts, *labels])))

    known = numbers(document) | numbers(document["runs"][0]["label"])
    # The scale of the headline, the end of the strips, chance, the footnote's number, the number of runs.
    furniture = {"0", "50", "100", "0.4", "1", "0.500", str(len(document["runs"]))}
    assert len(shown) > 50
    assert shown - known - furniture == set()


def test_hostile_names_and_texts_stay_text():
    record = replace(exposed_records().records[0], record_id=HOSTILE)
    findings = (Finding(HOSTILE, True, HOSTILE),)
    run = history(
        audit(0, 0.5, (5, 5), auc_by_group={HOSTILE: Measurement(None, note=HOSTILE)}),
        failure(1, error=HOSTILE),
        audit(2, 0.7, (5, 5), findings=findings),
        about=HOSTILE,
        caveat=HOSTILE,
        findings=findings,
        run_metadata=RunMetadata(others={HOSTILE: HOSTILE}),
    )

    found = parse(
        page(
            run,
            title=HOSTILE,
            exposed=replace(exposed_records(), records=(record,)),
            texts={HOSTILE: HOSTILE},
        )
    )

    assert elements(found, "script", "img") == []
    assert len(elements(found, "style")) == 1
    assert words(elements(found, "title")[0]) == HOSTILE
    assert words(elements(found, "h1")[0]) == HOSTILE
    assert words(by_id(found, "exposed-table")).count(HOSTILE) == 2
    assert words(by_id(found, "run-1-provenance")).count(HOSTILE) == 2


def test_records_are_named_and_texts_shown_only_where_asked_for():
    texts = {"ticket 17": "my pin is 1234"}

    plain = page(stopped_run())
    named = page(stopped_run(), exposed=exposed_records())
    quoted = page(stopped_run(), exposed=exposed_records(), texts=texts)

    assert "ticket 17" not in plain
    assert "ticket 17" in named
    assert "1234" not in named
    assert "my pin is 1234" in quoted
    assert "without any leakage about 40.5 would" in named


def test_the_headline_stands_with_its_interval_counts_and_caveat():
    panel = words(by_id(parse(page(stopped_run())), "run-1-headline"))

    assert (
        "At epoch 6 an attacker who is shown one record that was trained on and one that was not picks the "
        "right one 68 times in 100 [63 to 73]; guessing would be right 50 times." in panel
    )
    assert "The limit is 60 times in 100. It is exceeded, at 95 % confidence" in panel
    assert "95 % band over all audits of the run; 400 members, 800 non-members." in panel
    assert CAVEAT in panel
    assert "1 of 7 audits FAILED" in panel
    assert "1 of 4 checks found something; 1 remark at single audits" in panel


def test_a_refused_headline_shows_no_figure():
    run = history(audit(0, 0.5, (5, 5)), audit(1, 0.55, (5, 5)), failure(2))

    panel = by_id(parse(page(run)), "run-1-headline")

    assert words(having(panel, "class", "big")[0]) == "Unknown"
    assert "unknown, not absent" in words(panel)
    assert elements(panel, "svg") == []


def test_several_runs_have_their_caveats_beside_the_compared_headlines():
    found = parse(page(SEVERAL))

    rows = elements(by_id(found, "comparison-table"), "tr")
    assert [words(row)[:4] for row in rows[1:]] == ["LoRA", "full"]
    assert "0.684 [0.635, 0.733]" in words(rows[2])
    assert f"Read with full fine-tuning, LoRA. {CAVEAT}" in words(by_id(found, "comparison"))
    assert len(having(by_id(found, "curves"), "class", "leakage")) == 2 * 2 + 2 * 2


def drawing(histories, name="leakage-auc"):
    found = parse(page(histories))
    (chart,) = [one for one in elements(found, "svg") if one.get("aria-labelledby") == f"{name}-name"]
    return chart


def path(chart, name):
    return [found.get("d") for found in having(chart, "class", name) if tag(found) == "path"]


def points(line):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", line) if pair.strip()]


def test_the_curve_lies_where_the_values_are():
    chart = drawing(history(audit(0, 0.5, (5, 5)), audit(1, 0.55, (5, 5)), audit(2, 0.6, (5, 5))))

    (x0, y0), (x1, y1), (x2, y2) = points(path(chart, "curve")[0])
    budget = float(path(chart, "budget")[0].split()[1].split("H")[0])
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02)
    assert y0 > y2
    assert budget == pytest.approx(y2, abs=0.02)


def test_a_failed_audit_breaks_line_and_band_and_is_marked():
    chart = drawing(stopped_run())

    lines = [part for part in path(chart, "curve")[0].split("M") if part]
    assert [len(points("M" + line)) for line in lines] == [3, 3]
    assert len(path(chart, "band")) == 2
    assert len(path(chart, "lost")) == 1
    assert len(having(chart, "class", "gap")) == 1
    labels = [column.get("aria-label") for column in having(chart, "class", "column")]
    assert labels[3] == "Epoch 3, step 225. AUC: audit failed, unknown"
    assert labels[6] == "Epoch 6, step 450. AUC 0.684 [0.635, 0.733]. Over budget: stopped"


def test_an_audit_without_a_value_is_a_gap_and_never_zero():
    unresolved = {"auc": Measurement(None, note="too few")}
    run = history(audit(0, 0.5, (5, 5)), audit(1, 0.6, (5, 5), metrics=unresolved), audit(2, 0.52, (5, 5)))

    chart = drawing(run)

    assert path(chart, "curve")[0].count("M") == 2
    assert (
        having(chart, "class", "column")[1]
        .get("aria-label")
        .startswith("Epoch 1, step 75. AUC: not resolved")
    )


def test_stop_and_kept_audit_are_marked():
    chart = drawing(stopped_run())

    assert len(having(chart, "class", "stopmark")) == 1
    assert len(having(chart, "class", "ring")) == 1
    assert having(drawing(lora_run()), "class", "stopmark") == []


def test_a_budget_on_another_metric_has_a_curve_of_its_own_beside_the_auc():
    budget = LeakageBudget(limit=0.3, metric="tpr_at_fpr", fpr=0.1)
    run = history(audit(0, 0.5, (5, 5)), audit(1, 0.6, (5, 5)), budget=budget)

    assert len(having(drawing(run, "leakage-tpr_at_fpr_0-1"), "class", "budget")) == 1
    assert having(drawing(run), "class", "budget") == []
    assert drawing(run, "loss") is not None


def test_a_run_without_any_figure_draws_no_empty_axes():
    assert having(parse(page(history(failure(1)))), "class", "chart") == []


@pytest.mark.parametrize("n", [1, 2, 40])
def test_curves_stay_inside_the_drawing(n):
    aucs = [0.5 + 0.49 * i / n for i in range(n + 1)]
    run = history(
        *(audit(i, auc, (5.0 - 0.1 * i, 5), budget=None) for i, auc in enumerate(aucs)), budget=None
    )

    for name in ("leakage-auc", "loss"):
        chart = drawing(run, name)
        for x, y in points(path(chart, "curve")[0]):
            assert 40 <= x <= 430
            assert 10 <= y <= 250


def test_a_document_of_another_schema_is_refused():
    with pytest.raises(ConfigurationError, match="schema 1, need 2"):
        render_report(to_document(stopped_run()) | {"schema_version": 1})


def test_without_jinja_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)

    with pytest.raises(MissingDependencyError, match=r"ezmia-callbacks\[report\]"):
        write_report(stopped_run(), tmp_path / "report.html")


def palette(text):
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", text))


def luminance(color):
    """Relative luminance, WCAG 2.2."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    lighter, darker = sorted([luminance(one), luminance(other)], reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


LIGHT, DARK = CSS.split("@media screen and (prefers-color-scheme: dark)")[:2]
TEXT = [(name, ground) for name in ("ink", "quiet", "link", "unsure") for ground in ("page", "surface")]
TEXT += [(name, f"{name}-surface") for name in ("alert", "unsure", "calm")]
GRAPHICS = [(f"look-{i}", "surface") for i in range(6)] + [("axis", "surface"), ("ink", "surface")]


def test_contrast_is_computed_as_the_standard_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("colors", [palette(LIGHT), palette(DARK)], ids=["light", "dark"])
def test_text_and_curves_have_the_contrast_that_wcag_aa_asks_for(colors):
    for name, ground in TEXT:
        assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
    for name, ground in GRAPHICS:
        assert contrast(colors[name], colors[ground]) >= 3.0, (name, ground)


def test_dark_replaces_every_color_and_none_is_written_outside_the_palette():
    rules = CSS.split("* { box-sizing")[1]

    assert set(palette(LIGHT)) == set(palette(DARK))
    assert set(re.findall(r"#[0-9a-fA-F]{3,8}\b", rules)) <= {"#ffffff"}
    assert not re.search(r"green|--good|--ok\b", CSS)


def test_a_real_run_is_reported(tmp_path):
    rows, canaries = hold_out_canaries(make_rows(make_texts(90)), n_members=30, n_non_members=30, seed=0)
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=4)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    auditor.begin(model)
    ids = torch.tensor([row["input_ids"] for row in rows])
    for epoch in range(1, 5):
        model.train()
        for _ in range(8):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        if auditor.audit(model, epoch=epoch).decision.stop:
            break

    write_report(auditor.history, tmp_path / "report.html")

    found = parse((tmp_path / "report.html").read_text("utf-8"))
    value = auditor.history[-1].metrics["auc"].value
    assert f"{value:.3f}" in words(by_id(found, "run-1-log"))
    assert "30 members and 30 non-members" in words(elements(found, "header")[0])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A window gets the focus a moment after its page has loaded.
PROBE = """<script>
const column = document.querySelectorAll(".column")[4];
const seen = () => getComputedStyle(column.querySelector(".seen")).visibility;
const before = seen();
const measure = (attempts) => {
  column.focus();
  if (seen() !== "visible" && attempts > 0) {
    setTimeout(() => measure(attempts - 1), 50);
    return;
  }
  document.title = JSON.stringify({
    before,
    after: seen(),
    width: document.documentElement.scrollWidth,
    room: document.documentElement.clientWidth,
  });
};
measure(60);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("histories", [stopped_run(), SEVERAL], ids=["one", "several"])
def test_in_a_browser_a_phone_shows_it_whole_and_focus_shows_values(tmp_path, histories):
    text = page(histories, title="a" * 20 + " " + "long title " * 9)
    (tmp_path / "page.html").write_text(text, "utf-8")
    # The page itself forbids scripts; a copy that allows them measures itself.
    (tmp_path / "probe.html").write_text(
        re.sub("<meta http-equiv=[^>]*>", "", text).replace("</body>", PROBE), "utf-8"
    )

    def browse(name):
        return subprocess.run(
            [
                CHROMIUM,
                *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
                *("--window-size=390,844", f"--user-data-dir={tmp_path / 'profile'}"),
                *("--virtual-time-budget=5000", "--dump-dom"),
                (tmp_path / name).as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

    plain, probed = browse("page.html"), browse("probe.html")

    assert "CONSOLE" not in plain.stderr
    measured = json.loads(
        words(elements(html5lib.parse(probed.stdout, namespaceHTMLElements=False), "title")[0])
    )
    assert (measured["before"], measured["after"]) == ("hidden", "visible")
    assert measured["width"] <= measured["room"]
