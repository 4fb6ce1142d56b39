"""Whether members and non-members could be told apart before any training: what figures must not include."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.canaries.validity.checks import ValidityReport, check_validity
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.measuring.figures import mean_of_records
from ezmia_callbacks.results.result import Finding

if TYPE_CHECKING:
    from ezmia_callbacks.canaries.sets import CanarySet
    from ezmia_callbacks.scoring.statistics import TokenStatistics

__all__: list[str] = []


def check_split(
    canaries: CanarySet,
    reference: TokenStatistics,
    *,
    training_records: Iterable[Any] | None,
    confidence: float,
) -> ValidityReport:
    """What tells the two sides apart without the trained model.

    Args:
        canaries: The records that are scored.
        reference: The reference's statistics of them.
        training_records: Rows that will be trained on, in the form of the canaries.
        confidence: Confidence of the checks, in (0, 1).
    """
    n_scored = np.diff(reference.offsets)
    # One record of each group: those of a group are not independent.
    chosen = np.sort(np.unique(canaries.groups or canaries.record_ids, return_index=True)[1])
    return check_validity(
        canaries.select(chosen.tolist()),
        training_records=training_records,
        reference_losses=mean_of_records(-reference.log_probs, reference.offsets)[chosen],
        n_scored_tokens=n_scored[chosen],
        n_error_tokens=(n_scored * mean_of_records(~reference.is_correct, reference.offsets))[chosen],
        confidence=confidence,
    )


MET_BEFORE = "met before training"


def findings_of_split(report: ValidityReport) -> tuple[Finding, ...]:
    """What was looked at before the first step, found or not."""
    findings = [Finding(check.name, check.is_flagged, check.describe()) for check in report.checks]
    if report.met_before:
        findings.append(Finding(MET_BEFORE, True, report.met_before))
    return tuple(findings)


def refuse_blind_split(report: ValidityReport) -> None:
    """Refuse to judge a budget on a split of the user's whose sides can be told apart without the model.

    Raises:
        ConfigurationError: saying how far apart they are, and what to do.
    """
    if report.blind_auc > 0.5 and not report.is_randomized:
        raise ConfigurationError(
            f"{report.headline} A leakage budget cannot be judged on such a split: draw both sides "
            "from one pool with `hold_out_canaries`, or pass `allow_shift=True` to have the difference "
            "counted as leakage."
        )
