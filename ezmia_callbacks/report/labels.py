"""How runs, audits, metrics and scores are called where a person reads of them."""

from collections.abc import Iterable, Mapping, Sequence

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import fpr_of_metric
from ezmia_callbacks.functional.budget import metric_label as label_in_a_sentence
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult

__all__: list[str] = []

_SCORE_LABELS = {
    "strongest": "strongest",
    "ez": "EZ",
    "wbc": "WBC",
    "loss_difference": "loss-difference",
    "calibrated_min_k_plus_plus": "calibrated Min-K%++",
    "min_k": "Min-K%",
    "min_k_plus_plus": "Min-K%++",
}


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
    """Name of a metric for a reader, at the beginning of a line.

    >>> metric_label("advantage")
    'Membership advantage'
    """
    label = label_in_a_sentence(name)
    return label[:1].upper() + label[1:]


def chance_of(metric: str) -> float | None:
    """What a metric reads where nothing leaks; None for one that is not known here.

    >>> chance_of("tpr_at_fpr_0.01")
    0.01
    """
    fpr = fpr_of_metric(metric)
    return fpr if fpr is not None else {"auc": 0.5, "advantage": 0.0}.get(metric)


def score_label(name: str) -> str:
    """Name of a score for a reader.

    >>> score_label("ez")
    'EZ'
    """
    return _SCORE_LABELS.get(name, name.replace("_", " "))


def moment(result: AuditResult) -> str:
    """When an audit was made, for a sentence."""
    if result.is_baseline:
        return "the baseline"
    return f"step {result.step}" if result.epoch is None else f"epoch {result.epoch:.3g}"


def over_budget_is(rules: Iterable[str]) -> str:
    """What being over budget looks like in a picture, a sentence; empty if that differs from run to run.

    >>> over_budget_is(["lower", "lower"])
    'Over budget: the whole band is above it.'
    """
    shapes = {"lower": "the whole band", "point": "the curve itself", "upper": "any part of the band"}
    looks = {shapes[rule] for rule in rules}
    return f"Over budget: {looks.pop()} is above it." if len(looks) == 1 else ""


def percent(confidence: float) -> str:
    """A confidence for a sentence.

    >>> percent(0.95)
    '95 %'
    """
    return f"{100 * confidence:.4g} %"


def percents(rates: Sequence[float]) -> list[str]:
    """Rates in per cent, whole ones unless rounding would turn a rate into certainty or into chance.

    >>> percents([0.684, 0.612, 0.741])
    ['68', '61', '74']
    >>> percents([0.9991, 0.52, 1.0])
    ['99.9', '52.0', '100.0']
    """
    for n_decimals in range(4):
        shown = [f"{100 * rate:.{n_decimals}f}" for rate in rates]
        landmarks = {0.0, 0.5, 1.0}
        is_misleading = (
            float(text) / 100 in landmarks and rate not in landmarks
            for text, rate in zip(shown, rates, strict=True)
        )
        if not any(is_misleading):
            break
    return shown
