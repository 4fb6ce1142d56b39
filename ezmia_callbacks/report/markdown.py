"""The report document as a Markdown section, for a model card or a summary file: pure, text out."""

import re
from collections.abc import Mapping

from ezmia_callbacks.report.document import report_view
from ezmia_callbacks.report.labels import metric_label, percent, score_label
from ezmia_callbacks.report.shown import shown, what_is_left_out
from ezmia_callbacks.report.view import (
    AnyFigure,
    AuditView,
    EdgesView,
    IntervalView,
    MeasuredView,
    RefusedView,
    RunView,
    StatementView,
    Subject,
)
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.safe_text import for_terminal

__all__: list[str] = []

# Beside the scores that are judged: what a reader knows from elsewhere.
_COMPARED_SCORES = ("ez", "margin", "loss_difference", "loss")
_NOTHING = "–"  # noqa: RUF001 - a dash, not a minus sign


def summarize(histories: AuditHistory | Mapping[str, AuditHistory], *, subject: Subject | None = None) -> str:
    """A Markdown section on the leakage of one or several runs, ending with a newline.

    Per run: what is known of the weights that it has left, what happened, what to do now, every audit in a
    table, how the canaries were drawn, what the bands promise, and what none of it proves. Figures have three
    digits; those that the canaries do not resolve say so and are never shown as numbers.

    Args:
        histories: The audits of one run, or of several by label.
        subject: Model, data and author, as the section is to name them.

    Raises:
        ConfigurationError: if there is no history, or one has no audits.

    >>> from ezmia_callbacks import AuditResult, Decision
    >>> failed = AuditResult(9, 1.0, "failed", False, "ez", 50, 50, Decision(False, None, "failed"))
    >>> "1 of 1 audits FAILED" in summarize(AuditHistory((failed,)))
    True
    """
    view = report_view(histories, subject=subject)
    parts = ["## Membership leakage during fine-tuning", *_subject(view.subject)]
    if view.comparison is not None:
        parts.append(f"{_escape(view.comparison.text)} {_escape(view.comparison.note)}")
    for run in view.runs:
        if run.label:
            parts.append(f"### {_escape(run.label)}")
        parts += [_introduction(run), *_warnings(run), *_meaning(run), *_steps(run)]
        parts += [_table(run), _legend(run), *_reading(run)]
    parts.append(
        "**Limits.** Within budget is not proof of privacy. The figures speak of this attack and these "
        "canaries alone: a stronger attack may find more, and other records may be remembered better."
    )
    return "\n\n".join(parts) + "\n"


def _subject(subject: Subject) -> list[str]:
    stated = {"Model": subject.model, "Data": subject.data, "Author": subject.author}
    text = " · ".join(f"{name}: {_escape(value)}" for name, value in stated.items() if value)
    return [text] if text else []


def _introduction(run: RunView) -> str:
    rule = "no budget is known" if run.budget is None else run.budget.text
    scored = f", {run.n_tokens} scored tokens" if run.n_tokens else ""
    return (
        f"Attack: {_escape(run.attack)}. Canaries: {run.n_members} members, {run.n_non_members} "
        f"non-members{scored}. Budget: {_escape(rule)}."
    )


def _warnings(run: RunView) -> list[str]:
    """What has to be read before any figure."""
    return [f"> **{_escape(text)}**" for text in (run.caveat, run.failures) if text]


def _table(run: RunView) -> str:
    has_epochs = all(audit.epoch is not None for audit in run.audits)
    metrics, compared = _columns(run)
    score = _escape(run.score.label)
    is_watched = any(audit.n_members_seen is not None for audit in run.audits)
    header = ["epoch" if has_epochs else "step"]
    header += ["members seen", "AUC of the quarter fed last [interval]"] if is_watched else []
    header += ["member loss", "held-out loss"]
    header += [f"{_escape(metric_label(name))} ({score}) [{_kind(run, name)}]" for name in metrics]
    judged = {name.name for name in run.judged}
    header += [
        f"AUC ({_escape(score_label(name))}) [{_kind(run, 'auc') if name in judged else 'interval'}]"
        for name in compared
    ]
    header += ["edge records", "decision"]
    rows = [header, ["---"] * len(header)]
    for audit in shown(run).audits:
        when = f"{audit.epoch:.3g}" if has_epochs else str(audit.step)
        if audit.is_baseline:
            when += " (baseline)"
        of_feeding = [_n_seen(audit), _figure(audit.auc_recent)] if is_watched else []
        rows.append([when, *of_feeding, *_cells(run, audit, metrics, compared)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join(filter(None, (table, what_is_left_out(run))))


def _columns(run: RunView) -> tuple[list[str], list[str]]:
    """Names of the metrics, and of the other scores, that get a column."""
    names = [metric.name for metric in run.metrics]
    metrics = [name for name in names if name != "advantage" or name == run.decides]
    known = {figure.name for audit in run.audits for figure in audit.auc_by_score}
    judged = [name.name for name in run.judged]
    return metrics, [name for name in dict.fromkeys([*judged, *_COMPARED_SCORES]) if name in known]


def _kind(run: RunView, name: str) -> str:
    """What stands in the brackets of a column."""
    figures = [audit.metrics.get(name) for audit in run.audits_after_baseline]
    return "band" if any(figure and figure.band for figure in figures) else "interval"


def _cells(run: RunView, audit: AuditView, metrics: list[str], compared: list[str]) -> list[str]:
    if audit.status == "failed":
        unknown = ["unknown"] * (3 + len(metrics) + len(compared))
        reason = _escape(audit.error or "no reason was recorded")
        return [*unknown, f"AUDIT FAILED, leakage unknown: {reason}"]
    of_score = {figure.name: figure for figure in audit.auc_by_score}
    cells = [_loss(audit.member_loss), _loss(audit.non_member_loss)]
    by = f", {_escape(audit.decided_by.label)}" if len(run.judged) > 1 else ""
    cells += [_figure(audit.metrics.get(name)) + by for name in metrics]
    cells += [_figure(of_score.get(name)) for name in compared]
    decision = audit.decision
    verdict = _escape(decision.message) + (" → **STOP**" if decision.stops else "")
    return [*cells, _edges(audit.member_edges, audit.non_member_edges), verdict]


def _n_seen(audit: AuditView) -> str:
    return _NOTHING if audit.n_members_seen is None else f"{audit.n_members_seen} of {audit.n_members}"


def _loss(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def _figure(figure: AnyFigure | None) -> str:
    if figure is None:
        return _NOTHING
    value, note = figure.value, _escape(figure.note or "")
    if value is None:
        return f"not resolved: {note or 'too few canaries'}"
    certain = figure.certain
    if certain is None:
        return f"{value:.3f} (no interval: {note or 'none was computed'})"
    alone = f" (this audit alone; {note})" if note and figure.band is None else ""
    return f"{value:.3f} {_range(certain)}{alone}"


def _range(ends: IntervalView | MeasuredView) -> str:
    return f"[{ends.lower:.3f}, {ends.upper:.3f}]"


def _edges(members: EdgesView | None, non_members: EdgesView | None) -> str:
    if members is None or non_members is None:
        return _NOTHING
    return "; ".join(
        f"{name} {edges.n_no_errors}, {edges.n_no_negative}, {edges.n_low_evidence}"
        for name, edges in (("members", members), ("non-members", non_members))
    )


def _legend(run: RunView) -> str:
    lines = [
        "Losses are means over the canaries' scored tokens, in nats per token; the non-members give the "
        "held-out loss.",
        f"A band holds for all audits of the run together at {percent(run.band_confidence)}, an interval "
        f"for its own audit alone at {percent(run.confidence)}; the baseline has an interval only.",
    ]
    if any(audit.member_edges is not None for audit in run.audits):
        lines.append(
            "Edge records, on which the EZ ratio stands on its edge rules: without any error, with all error "
            "tokens moved up, with a single error token."
        )
    return " ".join(lines)


def _reading(run: RunView) -> list[str]:
    parts = [f"**All checkpoints.** {_escape(run.checkpoint_holder)}"] if run.checkpoint_holder else []
    parts += _validity(run)
    if run.about:
        parts.append(f"**Canaries.** {_sentence(run.about)}")
    return [*parts, f"**Confidence.** {_escape(run.promise)}"]


def _meaning(run: RunView) -> list[str]:
    """The weights that were left first, then the audit that stopped the run."""
    parts = [f"**{_escape(run.outcome.label)}.** {_statement(run.headline)}"]
    if run.at_stop is not None:
        parts.append(f"**What was stopped.** {_statement(run.at_stop)}")
    return [*parts, f"**What happened.** {_escape(run.outcome.text)}"]


def _statement(stated: StatementView) -> str:
    if isinstance(stated, RefusedView):
        return f"{_escape(stated.text)} {_escape(stated.against_limit)}"
    return (
        f"{_escape(stated.text)} {_escape(stated.against_limit)} (AUC {stated.value:.3f} {_range(stated)}, "
        f"{_escape(stated.basis)}.) {_escape(stated.meaning)}"
    )


def _steps(run: RunView) -> list[str]:
    if not run.next_steps:
        return []
    # Ours, with code in it, but for names of moments.
    steps = "\n".join(f"{i}. {' '.join(step.split())}" for i, step in enumerate(run.next_steps, start=1))
    return [f"**What to do now.**\n\n{steps}"]


def _validity(run: RunView) -> list[str]:
    """What was looked for: found or not, in words for what was found."""
    remarks = [
        (f"{finding.name}, {audit.moment}", finding)
        for audit in shown(run).audits
        for finding in audit.findings
    ]
    n_left_out = sum(len(audit.findings) for audit in run.audits) - len(remarks)
    checks = [*((check.name, check) for check in run.checks), *remarks]
    if not checks:
        return []
    absent = [name for name, check in checks if not check.is_flagged]
    lines = [f"* {_escape(name)}: {_sentence(check.text)}" for name, check in checks if check.is_flagged]
    if absent:
        lines.append(f"* Looked for and not found: {_escape('; '.join(absent))}.")
    if n_left_out:
        lines.append(f"* {n_left_out:,} more at audits that are not shown.")
    return ["**Validity.**\n\n" + "\n".join(lines)]


def _sentence(text: str) -> str:
    text = _escape(text).rstrip()
    return text if text.endswith(".") else text + "."


# Addresses that readers make links of by themselves, in text as well as behind a backslash.
_ADDRESS = re.compile(
    r"((?:\b[a-z][a-z0-9+.-]{0,30}://|\bwww\.|\b(?:mailto|xmpp):)\S+|[\w.+-]{1,64}@\S+)", re.IGNORECASE
)
# What begins a heading, a quotation, a list, a rule or a table at the start of a line.
_BLOCK = re.compile(r"^(?=[#>+=:-])")
_NUMBERED = re.compile(r"^(\d+)([.)])")
# Brackets that make a link or name its target; underscores at the ends of words; entities.
_INLINE = re.compile(
    r"(?P<escaped>[\\`*~|$]|\](?=[\[(:])|(?<!\w)_|_(?!\w))|(?P<tag><(?=[A-Za-z/!?]))|&(?=#|\w+;)"
)


def _escape(text: str) -> str:
    """A text from outside on one line, in which nothing is Markdown, a link, an image or HTML."""
    one_line = " ".join(for_terminal(" ".join(text.split())).split())
    # Addresses, at odd places, are shown as code.
    parts = [
        f"`{part.replace('`', '%60').replace('|', '%7C').replace(chr(92), '%5C')}`"
        if i % 2
        else _INLINE.sub(_escaped, part)
        for i, part in enumerate(_ADDRESS.split(one_line))
    ]
    return _NUMBERED.sub(r"\1\\\2", _BLOCK.sub(r"\\", "".join(parts)))


def _escaped(found: re.Match[str]) -> str:
    if found["escaped"]:
        return "\\" + found["escaped"]
    return "&lt;" if found["tag"] else "&amp;"
