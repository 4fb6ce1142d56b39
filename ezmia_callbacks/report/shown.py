"""Which audits of a long run pages, curves and Markdown show: nobody reads a table of thousands of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ezmia_callbacks.report.view import AuditView, RunView

__all__: list[str] = []

# Of a run with more audits than this some are left out.
_N_ALL_SHOWN = 200
_N_STRETCHES = 50


def shown(run: RunView) -> RunView:
    """The run with the audits that are shown, of up to 200 all of them.

    Of a longer one these are the first and the last audit, the one that stopped it and the last one within
    budget, the first with each verdict and with each finding; and of each of 50 equal stretches the one that
    reads most by the metric that decides, the first over budget and the first that is unknown. So what is
    left out neither leaks more than its neighbors, nor is a gap or an excess that no neighbor shows.
    """
    return replace(run, audits=tuple(run.audits[i] for i in numbers_shown(run)))


def what_is_left_out(run: RunView) -> str:
    """Say how many audits are not shown, and where they are; empty if all are."""
    n_shown = len(numbers_shown(run))
    if n_shown == len(run.audits):
        return ""
    return (
        f"{n_shown} of {len(run.audits):,} audits are shown: the first and the last, those that decided, "
        f"the first with each verdict and each remark, and of each of {_N_STRETCHES} stretches the one that "
        "reads most, the first over budget and the first that is unknown. The JSON document has all of them."
    )


def numbers_shown(run: RunView) -> Sequence[int]:
    """Numbers of the audits that are shown, ascending."""
    if len(run.audits) <= _N_ALL_SHOWN:
        return range(len(run.audits))
    return sorted({*_landmarks(run), *_of_stretches(run)})


def _landmarks(run: RunView) -> Iterator[int]:
    decisive = [a for a in (run.stopped, run.last_within_budget, run.kept) if a is not None]
    known: set[str] = set()
    for i, audit in enumerate(run.audits):
        said = {audit.decision.verdict, *(finding.name for finding in audit.findings)}
        if not said <= known or any(audit is each for each in decisive):
            yield i
        known |= said
    yield len(run.audits) - 1


def _of_stretches(run: RunView) -> Iterator[int]:
    n_audits = len(run.audits)
    for k in range(_N_STRETCHES):
        stretch = range(k * n_audits // _N_STRETCHES, (k + 1) * n_audits // _N_STRETCHES)
        yield max(stretch, key=lambda i: _reading(run.audits[i], run.decides))
        for verdict in ("over budget", "not judged"):
            yield from [i for i in stretch if run.audits[i].decision.verdict == verdict][:1]


def _reading(audit: AuditView, metric: str) -> float:
    figure = audit.metrics.get(metric)
    return -1.0 if figure is None or figure.value is None else figure.value
