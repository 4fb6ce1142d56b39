"""Audit histories as a Markdown section, for a model card or a summary file: pure, text out."""

import re
from collections.abc import Mapping

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.intervals import Interval
from ezmia_callbacks.history import AuditHistory
from ezmia_callbacks.results import AuditResult, EdgeCounts, Measurement

__all__ = ["counts_line", "histories_by_label", "metric_label", "moment", "score_label", "summarize"]

_SCORE_LABELS = {
    "ez": "EZ",
    "wbc": "WBC",
    "loss_difference": "loss-difference",
    "calibrated_min_k_plus_plus": "calibrated Min-K%++",
    "min_k": "Min-K%",
    "min_k_plus_plus": "Min-K%++",
}
# Beside the deciding score: what a reader knows from elsewhere.
_COMPARED_SCORES = ("ez", "loss_difference", "loss")
_NOTHING = "–"  # noqa: RUF001 - a dash, not a minus sign


def summarize(histories: AuditHistory | Mapping[str, AuditHistory]) -> str:
    """A Markdown section on the leakage of one or several runs, ending with a newline.

    Per run: every audit in a table, then what the figures mean, what happened, how the canaries were
    drawn, what the bands promise, and what none of it proves. Figures have three digits; those that the
    canaries do not resolve say so and are never shown as numbers.

    Args:
        histories: The audits of one run, or of several by label.

    Raises:
        ConfigurationError: if there is no history, or one has no audits.

    >>> from ezmia_callbacks.functional.budget import Decision
    >>> failed = AuditResult(9, 1.0, "failed", False, "ez", 50, 50, Decision(False, None, "failed"))
    >>> "1 of 1 audits FAILED" in summarize(AuditHistory((failed,)))
    True
    """
    runs = histories_by_label(histories)
    parts = ["## Membership leakage during fine-tuning"]
    for label, history in runs.items():
        if label:
            parts.append(f"### {_escape(label)}")
        parts += [_introduction(history), *_failures(history), _table(history), _legend(history)]
        parts += _reading(history)
    parts.append(
        "**Limits.** Within budget is not proof of privacy. The figures speak of this attack and these "
        "canaries alone: a stronger attack may find more, and other records may be remembered better."
    )
    return "\n\n".join(parts) + "\n"


def histories_by_label(histories: AuditHistory | Mapping[str, AuditHistory]) -> dict[str, AuditHistory]:
    """The runs by label; a single history gets the empty label.

    Raises:
        ConfigurationError: if there is no history, or one has no audits.
    """
    runs = {"": histories} if isinstance(histories, AuditHistory) else dict(histories)
    if not runs:
        raise ConfigurationError("Got no history: at least one is needed.")
    for label, history in runs.items():
        if not len(history):
            name = f"The history {label!r}" if label else "The history"
            raise ConfigurationError(f"{name} has no audits: run the training with the callback first.")
    return runs


def metric_label(name: str) -> str:
    """Name of a metric for a reader.

    >>> metric_label("tpr_at_fpr_0.01")
    'TPR at 1 % FPR'
    """
    if name.startswith("tpr_at_fpr_"):
        return f"TPR at {100 * float(name.removeprefix('tpr_at_fpr_')):g} % FPR"
    return {"auc": "AUC", "advantage": "Membership advantage"}.get(name, name)


def score_label(name: str) -> str:
    """Name of a score for a reader.

    >>> score_label("ez")
    'EZ'
    """
    return _SCORE_LABELS.get(name, name.replace("_", " "))


def counts_line(history: AuditHistory) -> str:
    """How many records stand on each side.

    >>> from ezmia_callbacks.functional.budget import Decision
    >>> result = AuditResult(9, 1.0, "failed", False, "ez", 50, 60, Decision(False, None, "failed"))
    >>> counts_line(AuditHistory((result,)))
    '50 members, 60 non-members'
    """
    return f"{history[0].n_members} members, {history[0].n_non_members} non-members"


def moment(result: AuditResult) -> str:
    """When an audit was made, for a sentence."""
    if result.is_baseline:
        return "the baseline"
    return f"step {result.step}" if result.epoch is None else f"epoch {result.epoch:.3g}"


def _introduction(history: AuditHistory) -> str:
    rule = "no budget is known" if history.budget is None else history.budget.describe()
    n_tokens = max(result.n_tokens for result in history)
    scored = f", {n_tokens} scored tokens" if n_tokens else ""
    return (
        f"Attack: {score_label(history[0].score)}. Canaries: {counts_line(history)}{scored}. Budget: {rule}."
    )


def _failures(history: AuditHistory) -> list[str]:
    if not history.n_failed:
        return []
    text = (
        f"> **{history.n_failed} of {len(history)} audits FAILED. Leakage there is unknown; it is neither "
        "zero nor within budget.**"
    )
    if history[-1].status == "failed":
        text += " **The last audit is one of them: the leakage of the final weights is unknown.**"
    return [text]


def _table(history: AuditHistory) -> str:
    has_epochs = all(result.epoch is not None for result in history)
    metrics, compared = _columns(history)
    score = score_label(history[0].score)
    header = ["epoch" if has_epochs else "step", "member loss", "held-out loss"]
    header += [f"{metric_label(name)} ({score}) [{_kind(history, name)}]" for name in metrics]
    header += [f"AUC ({score_label(name)}) [interval]" for name in compared]
    header += ["edge records", "decision"]
    rows = [header, ["---"] * len(header)]
    for result in history:
        when = f"{result.epoch:.3g}" if has_epochs else str(result.step)
        if result.is_baseline:
            when += " (baseline)"
        rows.append([when, *_cells(result, metrics, compared)])
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows)


def _columns(history: AuditHistory) -> tuple[list[str], list[str]]:
    """Names of the metrics, and of the other scores, that get a column."""
    seen = dict.fromkeys(name for result in history for name in result.metrics)
    is_decided = {history.budget.name} if history.budget is not None else set()
    metrics = [name for name in seen if name != "advantage" or name in is_decided]
    compared = [name for name in _COMPARED_SCORES if any(name in result.auc_by_score for result in history)]
    return metrics, compared


def _kind(history: AuditHistory, name: str) -> str:
    """What stands in the brackets of a column."""
    looks = [result.metrics[name] for result in history.looks if name in result.metrics]
    if any(measurement.band is not None for measurement in looks):
        return "band"
    return "interval"


def _cells(result: AuditResult, metrics: list[str], compared: list[str]) -> list[str]:
    if result.status == "failed":
        unknown = ["unknown"] * (3 + len(metrics) + len(compared))
        return [*unknown, f"AUDIT FAILED, leakage unknown: {result.error or 'no reason was recorded'}"]
    cells = [_loss(result.member_loss), _loss(result.non_member_loss)]
    cells += [_figure(result.metrics.get(name)) for name in metrics]
    cells += [_figure(result.auc_by_score.get(name)) for name in compared]
    verdict = result.decision.message + (" → **STOP**" if result.decision.stop else "")
    return [*cells, _edges(result.member_edges, result.non_member_edges), verdict]


def _loss(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def _figure(measurement: Measurement | None) -> str:
    if measurement is None:
        return _NOTHING
    if measurement.value is None:
        return f"not resolved: {measurement.note or 'too few canaries'}"
    certain = measurement.band or measurement.interval
    if certain is None:
        return f"{measurement.value:.3f} (no interval: {measurement.note or 'none was computed'})"
    alone = "" if measurement.band is not None else _alone(measurement)
    return f"{measurement.value:.3f} {_range(certain)}{alone}"


def _alone(measurement: Measurement) -> str:
    return f" (this audit alone; {measurement.note})" if measurement.note else ""


def _range(interval: Interval) -> str:
    return f"[{interval.lower:.3f}, {interval.upper:.3f}]"


def _edges(members: EdgeCounts | None, non_members: EdgeCounts | None) -> str:
    if members is None or non_members is None:
        return _NOTHING
    return "; ".join(
        f"{name} {edges.n_no_errors}, {edges.n_no_negative}, {edges.n_low_evidence}"
        for name, edges in (("members", members), ("non-members", non_members))
    )


def _legend(history: AuditHistory) -> str:
    percent = _percent(history.confidence)
    lines = [
        "Losses are means over the canaries' scored tokens, in nats per token; the non-members give the "
        "held-out loss.",
        f"A band holds for all audits of the run together at {_percent(history.band_confidence)}, "
        f"an interval for its own audit alone at {percent}; the baseline has an interval only.",
    ]
    if any(result.member_edges is not None for result in history):
        lines.append(
            "Edge records, on which the EZ ratio stands on its edge rules: without any error, with all error "
            "tokens moved up, with a single error token."
        )
    return " ".join(lines)


def _reading(history: AuditHistory) -> list[str]:
    parts = [_meaning(history), _events(history)]
    parts += _shift(history)
    if history.about:
        parts.append(f"**Canaries.** {_sentence(history.about)}")
    return [*parts, _promise(history)]


def _meaning(history: AuditHistory) -> str:
    text = (
        "**Reading.** AUC is the probability that a random member scores higher than a random non-member: "
        "0.5 is chance, 1 tells them apart without error."
    )
    told = [result for result in history.looks if _auc(result) is not None]
    if not told:
        return text + " No audit after the baseline gave a figure: the leakage of this run is unknown."
    chosen = [result for result in (history.last_within_budget, history.stopped) if result in told]
    if history.stopped is None:
        chosen = [told[-1]]
    for result in chosen:
        measurement = result.metrics["auc"]
        text += (
            f" At {moment(result)} a random member scores higher than a random non-member with probability "
            f"{_figure(measurement)}, {'interval' if measurement.band is None else 'band'} at "
            f"{_percent(history.confidence)}, from {result.n_members} members and "
            f"{result.n_non_members} non-members."
        )
    return text


def _auc(result: AuditResult) -> float | None:
    measurement = result.metrics.get("auc")
    return None if measurement is None else measurement.value


def _events(history: AuditHistory) -> str:
    stopped, kept = history.stopped, history.last_within_budget
    if stopped is not None:
        text = f"**What happened.** Stopped at {moment(stopped)}: {_sentence(stopped.decision.message)}"
        if kept is None:
            return text + " No audit was within budget."
        weights = "the weights from before training" if kept.is_baseline else f"the weights of {moment(kept)}"
        return text + f" Kept, as the last within budget: {weights} (unless `restore=False`)."
    last = history[-1]
    if last.status == "failed":
        return "**What happened.** The run was not stopped, and its last audit failed: no verdict on its end."
    if history.budget is None and last.decision.limit is None:
        return "**What happened.** The run was measured without a budget: nothing could stop it."
    if last.is_baseline:
        return "**What happened.** Only the baseline was audited: there is no verdict on trained weights."
    return (
        f"**What happened.** The run was not stopped. At {moment(last)}: {_sentence(last.decision.message)}"
    )


def _shift(history: AuditHistory) -> list[str]:
    """What the baseline says about members and non-members before any training."""
    baseline = next((result for result in history if result.is_baseline), None)
    measurement = None if baseline is None else baseline.auc_by_score.get("loss")
    if measurement is None or measurement.value is None or measurement.interval is None:
        return []
    figure = f"{measurement.value:.3f} {_range(measurement.interval)}"
    text = (
        "**Baseline.** Before training a score that compares with the reference ties on all records, so its "
        f"AUC is 0.5 by construction; the one to look at is the AUC of the bare loss, {figure}."
    )
    if 0.5 in measurement.interval:
        return [text + " It agrees with 0.5: no sign that members and non-members differed beforehand."]
    return [
        text + " **It excludes 0.5: members and non-members differed before any training, and the leakage "
        "figures include this difference.**"
    ]


def _promise(history: AuditHistory) -> str:
    percent = _percent(history.band_confidence)
    risk = f"{100 * (1 - history.band_confidence):.3g} %"
    text = f"**Confidence.** The bands hold for all audits of this run together at {percent} (union bound)."
    if history.budget is None:
        return text
    return (
        text
        + {
            "lower": f" A run whose true leakage stays within the limit is stopped with probability at most "
            f"{risk}; a run that goes on may still exceed it.",
            "upper": f" A run whose true leakage exceeds the limit goes on with probability at most {risk}.",
            "point": " The stop reads the bare estimate and carries no such promise.",
        }[history.budget.rule]
    )


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g} %"


def _sentence(text: str) -> str:
    text = _escape(text).rstrip()
    return text if text.endswith(".") else text + "."


def _escape(text: str) -> str:
    """Text on one line that neither ends a table cell nor starts an HTML tag."""
    one_line = " ".join(text.split())
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", one_line.replace("\\", "\\\\").replace("|", "\\|"))
