"""The audits of a finished run as one history, whatever the number of bases, with all that was noticed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ezmia_callbacks.post_hoc.bases import Base
from ezmia_callbacks.post_hoc.checkpoints import Checkpoint
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import Finding

__all__: list[str] = []

# Name of the finding about a folder that holds the same model as another.
NOT_AUDITED_TWICE = "not audited twice"


@dataclass(frozen=True)
class Curve:
    """The checkpoints of one base.

    Attributes:
        base: The base.
        checkpoints: Its checkpoints, in the order of the run.
        history: Their audits, after the baseline of this base.
        findings: What was found before the first of them.
        of_audits: What was found at each of them, one tuple a checkpoint.
    """

    base: Base
    checkpoints: Sequence[Checkpoint]
    history: AuditHistory
    findings: tuple[Finding, ...]
    of_audits: Sequence[tuple[Finding, ...]]


def join(curves: Sequence[Curve], checkpoints: Sequence[Checkpoint]) -> AuditHistory:
    """One history: the baseline of the first base, then the audits in the order of the checkpoints.

    Args:
        curves: The curves, one a base.
        checkpoints: All checkpoints.
    """
    first = curves[0].history
    audits = {}
    for curve in curves:
        for checkpoint, audit, found in zip(
            curve.checkpoints, curve.history.audits_after_baseline, curve.of_audits, strict=True
        ):
            findings = (*audit.findings, *found)
            if len(curves) > 1:
                about = f"Compared with the base that its adapter names, {curve.base.name}."
                findings = (*findings, Finding("base", True, about))
            audits[checkpoint.path] = replace(audit, findings=findings)
    names = "; ".join(curve.base.name for curve in curves)
    return replace(
        first,
        results=(first[0], *(audits[checkpoint.path] for checkpoint in checkpoints)),
        findings=(*_before(curves), *_twins(checkpoints)),
        caveat=" ".join(dict.fromkeys(curve.history.caveat for curve in curves if curve.history.caveat)),
        run_metadata=replace(first.run_metadata, n_checkpoints=len(checkpoints), base_model=names),
    )


def _before(curves: Sequence[Curve]) -> Mapping[Finding, None]:
    """What was found before the first audit, each once."""
    return dict.fromkeys(f for curve in curves for f in (*curve.history.findings, *curve.findings))


def _twins(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    return [
        Finding(
            NOT_AUDITED_TWICE,
            True,
            f"{twin.resolve().name} was not audited: its configuration and its weights are, to the last bit, "
            f"those of {checkpoint.name}, whose audit speaks of both.",
        )
        for checkpoint in checkpoints
        for twin in checkpoint.twins
    ]
