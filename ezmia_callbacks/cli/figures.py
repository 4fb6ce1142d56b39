"""Figures of an audit as cells of a table."""

from ezmia_callbacks.results.result import AuditResult

__all__: list[str] = []


def epoch_of(result: AuditResult) -> str:
    """Epochs done, or the step where they are unknown."""
    return f"step {result.step}" if result.epoch is None else f"{result.epoch:.3g}"


def verdict_of(result: AuditResult) -> str:
    """The verdict with its reason, on one line."""
    if result.status == "failed":
        return " ".join(f"FAILED, leakage unknown: {result.error}".split())
    return "baseline" if result.is_baseline else result.decision.message
