"""Figures of an audit as cells of a table."""

from ezmia_callbacks.results.result import AuditResult, Measurement

__all__: list[str] = []

_NOTHING = "-"


def figure(measurement: Measurement | None) -> str:
    """A figure with its band, or why there is none; never a bare number without one."""
    if measurement is None:
        return _NOTHING
    if measurement.value is None:
        return "not resolved"
    bounds = measurement.band or measurement.interval
    if bounds is None:
        return f"{measurement.value:.3f} (no interval)"
    return f"{measurement.value:.3f} [{bounds.lower:.3f}, {bounds.upper:.3f}]"


def loss(value: float | None) -> str:
    """A loss in nats per token."""
    return _NOTHING if value is None else f"{value:.3f}"


def epoch_of(result: AuditResult) -> str:
    """Epochs done, or the step where they are unknown."""
    return f"step {result.step}" if result.epoch is None else f"{result.epoch:.3g}"


def verdict_of(result: AuditResult) -> str:
    """The verdict with its reason, on one line."""
    if result.status == "failed":
        return " ".join(f"FAILED, leakage unknown: {result.error}".split())
    return "baseline" if result.is_baseline else result.decision.message
