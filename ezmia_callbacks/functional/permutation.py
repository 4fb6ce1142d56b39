"""Exact test of "this model leaked at no audit", over all audits of a run at once.

Whether leakage rose between two given audits is another question, which
`intervals.paired_delong_difference(later, earlier, is_member)` answers: it did if the lower end of its
interval is above 0. Which two audits are compared must not be chosen by looking at them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.roc import split_by_class

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__: list[str] = []

# Labels that are permuted at once: bounds the memory, not the result.
_CELLS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class PermutationTest:
    """Evidence against "no leakage at any audit".

    Attributes:
        largest_auc: AUC farthest from one half over all audits, in [0, 1]: below it members score lower.
        audit: Index of the (first) audit that has it, from 0.
        p_value: Probability of an AUC so far from one half, or farther, at any audit of a model that leaks
            nothing; at least 1 / (n_permutations + 1).
        n_permutations: Number of permutations behind it.
    """

    largest_auc: float
    audit: int
    p_value: float
    n_permutations: int


def leakage_permutation_test(
    scores: Float[np.ndarray, "n_audits n"],
    is_member: Bool[np.ndarray, " n"],
    *,
    n_permutations: int = 9999,
    seed: int = 0,
) -> PermutationTest:
    """Test of "no leakage at any audit" by the AUC farthest from one half over all audits.

    Labels are permuted once for all audits together, so that the scores of one record, which resemble each
    other from audit to audit, stay together: less conservative than a union bound. Exact if membership
    was drawn at random with fixed numbers of members and non-members, or by independent coins; not for
    coins within pairs. It rejects "no leakage at all", and says nothing about a budget.

    Args:
        scores: Membership scores, finite, one row per audit, or per audit and score.
        is_member: True where the record was in the training set.
        n_permutations: Number of random permutations, >= 1.
        seed: Seed of the permutations.

    Raises:
        ConfigurationError: if the arrays do not match, a score is not finite, there is no audit, or
            `n_permutations` is below 1.
        TooFewCanariesError: if either class is empty.

    Source: max-T permutation test of Westfall and Young 1993; p = (1 + #>=) / (B + 1) of Phipson and Smyth
    2010.

    >>> is_member = np.arange(40) < 20
    >>> test = leakage_permutation_test(np.stack([np.zeros(40), is_member * 1.0]), is_member)
    >>> test.largest_auc, test.audit, test.p_value
    (1.0, 1, 0.0001)
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ConfigurationError(
            f"`scores` has shape {values.shape}, but it needs shape (n_audits, n_records) with at least one "
            "audit: stack the scores of the audits."
        )
    if n_permutations < 1:
        raise ConfigurationError(f"`n_permutations` is {n_permutations}, but it needs to be at least 1.")
    for row in values:
        split_by_class(row, is_member)

    labels = np.asarray(is_member)
    n_members, n_records = int(labels.sum()), len(labels)
    # Sums of mid-ranks are multiples of 1/2: exact in float64, so that equal AUCs compare as equal.
    ranks = scipy.stats.rankdata(values, axis=1)
    sums = ranks[:, labels].sum(axis=1)
    # An attacker turns a score around that is low for members.
    expected = n_members * (n_records + 1) / 2
    observed = np.abs(sums - expected)
    rng = np.random.default_rng(seed)
    n_at_least = 0
    step = max(1, _CELLS_AT_ONCE // n_records)
    for first in range(0, n_permutations, step):
        n_rows = min(step, n_permutations - first)
        permuted = rng.permuted(np.tile(labels, (n_rows, 1)), axis=1)
        largest = np.abs(permuted.astype(np.float64) @ ranks.T - expected).max(axis=1)
        n_at_least += int(np.count_nonzero(largest >= observed.max()))
    n_wins = float(sums[np.argmax(observed)]) - n_members * (n_members + 1) / 2
    return PermutationTest(
        largest_auc=n_wins / (n_members * (n_records - n_members)),
        audit=int(np.argmax(observed)),
        p_value=(1 + n_at_least) / (n_permutations + 1),
        n_permutations=n_permutations,
    )
