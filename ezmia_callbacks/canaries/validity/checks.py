"""Whether canaries can carry a measurement, found out before the first training step.

An attack that tells members from non-members without the model proves nothing about the model. Each check
here looks for one way to do so, or for another reason why leakage would read wrong. Checks only report:
removing records by what was found about one side would make the very shift that is looked for. Deduplicate
or filter the pool, then draw the split from it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from ezmia_callbacks.canaries.records import Record, record_text
from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.canaries.validity.near_duplicates import near_duplicates, record_units
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.intervals import Interval, delong_interval, hanley_mcneil_standard_error
from ezmia_callbacks.functional.roc import auc

__all__: list[str] = []

LOSS_BEFORE_TRAINING = "mean loss before training"
_ERRORS_BEFORE_TRAINING = "number of wrongly predicted tokens before training"

MINIMUM_SCORED_TOKENS = 32
MINIMUM_ERROR_TOKENS = 8
_N_FOLDS = 5
_N_PERMUTATIONS = 100
# The classifier's matrices grow with the square of this; more records would hardly narrow the interval.
_MAX_CLASSIFIED = 4000
_RIDGE = 1.0
_MAX_PAIRS_KEPT = 1000


@dataclass(frozen=True)
class BlindCheck:
    """How well something other than the trained model tells members from non-members.

    Attributes:
        name: What was compared.
        auc: Its AUC; 0.5 if the two sides are alike.
        interval: Interval of the AUC, its error rate shared with the report's other blind checks.
        n_members: Members compared.
        n_non_members: Non-members compared.
        is_trained: Whether a classifier chose the direction; otherwise, an AUC below 0.5 counts as well.
    """

    name: str
    auc: float
    interval: Interval
    n_members: int
    n_non_members: int
    is_trained: bool = False

    @property
    def blind_auc(self) -> float:
        """AUC that an attacker surely reaches with this alone, at least 0.5."""
        reached = self.interval.lower
        if not self.is_trained:
            reached = max(reached, 1.0 - self.interval.upper)
        return max(0.5, reached)

    @property
    def is_flagged(self) -> bool:
        """Whether the two sides differ by more than chance."""
        return self.blind_auc > 0.5

    def describe(self) -> str:
        """Say in one sentence what was found, and how small a difference would have been seen."""
        found = "differs between members and non-members" if self.is_flagged else "shows no difference"
        error = hanley_mcneil_standard_error(0.5, n_members=self.n_members, n_non_members=self.n_non_members)
        quantile = scipy.stats.norm.ppf(0.5 + self.interval.confidence / 2)
        visible = 0.5 + (quantile + scipy.stats.norm.ppf(0.8)) * error
        return (
            f"{self.name}: {found} (AUC {self.auc:.3f}, {self.interval.confidence:.1%} interval "
            f"{self.interval.lower:.3f} to {self.interval.upper:.3f}). With {self.n_members} members and "
            f"{self.n_non_members} non-members the standard error is {error:.3f} or more: differences below "
            f"an AUC of about {visible:.2f} are likely to be missed."
        )


@dataclass(frozen=True)
class NearDuplicateCheck:
    """Which non-members have a near copy where there should be none.

    Attributes:
        name: Where copies were looked for.
        pairs: Id of the non-member, id or row number of its near copy, and the share of the shorter text that
            the two have in common, in [0.8, 1]; at most the first 1000.
        n_affected: Number of non-members with a near copy.
        n_non_members: Number of non-members.
        n_searched: Number of records that were searched.
    """

    name: str
    pairs: tuple[tuple[str, str, float], ...]
    n_affected: int
    n_non_members: int
    n_searched: int

    @property
    def is_flagged(self) -> bool:
        """Whether there is one."""
        return self.n_affected > 0

    def describe(self) -> str:
        """Say in one sentence how many there are, and what follows."""
        found = f"{self.n_affected} of {self.n_non_members} non-members"
        if not self.is_flagged:
            return (
                f"{self.name}: none of {self.n_non_members} non-members has one in {self.n_searched} records."
            )
        examples = ", ".join(f"'{own}' and '{other}'" for own, other, _ in self.pairs[:3])
        return (
            f"{self.name}: {found} have one in {self.n_searched} records ({examples}). A near copy in "
            "the training set makes a non-member partly a member: measured leakage is too low, and rates at "
            "a low FPR are wrong. Remove near copies from the pool before drawing the split, never from one "
            "side only."
        )


@dataclass(frozen=True)
class EvidenceCheck:
    """Whether records have enough tokens for a score that tells members apart.

    Attributes:
        name: Which tokens were counted.
        n_needed: Tokens that a record should have.
        median: Their median over the records.
        n_below: Number of records with fewer.
        n_records: Number of records.
    """

    name: str
    n_needed: int
    median: float
    n_below: int
    n_records: int

    @property
    def is_flagged(self) -> bool:
        """Whether more than half of the records have too few."""
        return 2 * self.n_below > self.n_records

    def describe(self) -> str:
        """Say in one sentence how many records have enough."""
        consequence = (
            " Scores are noisy, and measured leakage is too low: use longer records."
            if self.is_flagged
            else ""
        )
        return (
            f"{self.name}: {self.n_below} of {self.n_records} records have fewer than {self.n_needed} "
            f"(median {self.median:g}).{consequence}"
        )


ValidityCheck: TypeAlias = BlindCheck | NearDuplicateCheck | EvidenceCheck


@dataclass(frozen=True)
class ValidityReport:
    """All checks of one canary set.

    Attributes:
        checks: The checks that could be made.
        is_randomized: Whether this library drew membership.
    """

    checks: tuple[ValidityCheck, ...]
    is_randomized: bool

    @property
    def is_flagged(self) -> bool:
        """Whether any check found something."""
        return any(check.is_flagged for check in self.checks)

    @property
    def blind_auc(self) -> float:
        """Largest AUC that an attacker surely reaches without the trained model, at least 0.5."""
        return max((c.blind_auc for c in self.checks if isinstance(c, BlindCheck)), default=0.5)

    @property
    def met_before(self) -> str:
        """Say which side the model has met before, and what follows; empty if nothing tells of that.

        Where this library drew the sides from one pool, only the model can make their losses differ.
        """
        loss = next((c for c in self.checks if c.name == LOSS_BEFORE_TRAINING), None)
        if not self.is_randomized or not isinstance(loss, BlindCheck) or not loss.is_flagged:
            return ""
        are_members = loss.auc < 0.5
        met = "members" if are_members else "non-members"
        reads = "far too LOW, and hide leakage" if are_members else "too HIGH"
        return (
            f"The model has met the {met} before: both sides were drawn at random from one pool, and yet its "
            f"loss on the {met} is lower (AUC of the loss {loss.auc:.3f}, {loss.interval.confidence:.1%} "
            f"interval {loss.interval.lower:.3f} to {loss.interval.upper:.3f}). What it already remembers of "
            f"them cannot rise any more, so that scores which compare with it read {reads}. Give the model "
            "from before it met them as `reference=`, or draw from records that it never saw. A fair draw "
            f"looks like this by chance in about {1.0 - loss.interval.confidence:.0%} of the cases; another "
            "seed then will not."
        )

    @property
    def headline(self) -> str:
        """Say what has to stand beside the leakage figure; empty if nothing does."""
        sentences = [self.met_before] if self.met_before else []
        of_the_model = (LOSS_BEFORE_TRAINING, _ERRORS_BEFORE_TRAINING) if self.met_before else ()
        shifted = [
            c
            for c in self.checks
            if isinstance(c, BlindCheck) and c.is_flagged and c.name not in of_the_model
        ]
        if shifted:
            worst = max(shifted, key=lambda check: check.blind_auc)
            sentences.append(
                "Members and non-members can be told apart without the model (AUC at least "
                f"{worst.blind_auc:.3f} by {worst.name}): the leakage figure is not evidence of memorization "
                "unless it is well above that."
            )
        copied = [c for c in self.checks if isinstance(c, NearDuplicateCheck) and c.is_flagged]
        if copied:
            worst_copied = max(copied, key=lambda check: check.n_affected)
            sentences.append(
                f"{worst_copied.n_affected} of {worst_copied.n_non_members} non-members have near copies "
                f"({worst_copied.name}): the leakage figure is likely too low."
            )
        if any(isinstance(c, EvidenceCheck) and c.is_flagged for c in self.checks):
            sentences.append(
                "Most records are too short to be scored well: the leakage figure is likely too low."
            )
        if not self.is_randomized and not shifted:
            sentences.append(
                "Membership was not drawn at random: the leakage figure may include differences that these "
                "checks cannot detect."
            )
        return " ".join(sentences)

    def describe(self) -> str:
        """Say what each check found, a line each, and what follows from all."""
        lines = [("FLAGGED  " if check.is_flagged else "ok  ") + check.describe() for check in self.checks]
        return "\n".join([*lines, self.headline or "Nothing found that would distort the leakage figure."])


def check_validity(
    canaries: CanarySet,
    *,
    training_records: Iterable[Record] | None = None,
    reference_losses: ArrayLike | None = None,
    is_truncated: ArrayLike | None = None,
    n_scored_tokens: ArrayLike | None = None,
    n_error_tokens: ArrayLike | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> ValidityReport:
    """Look for ways to tell members from non-members without the model, and for what spoils the figure.

    Lengths and words are always compared; the rest where it is given. Sets that were split at random are
    flagged by all blind checks together with a probability of at most about 1 - confidence.

    Args:
        canaries: The canaries.
        training_records: Rows that will be trained on, members among them; read once, in the shape of the
            canaries. Near copies of non-members are looked for in them.
        reference_losses: Mean loss of each record under the model before training, (n_records,). Tells of a
            shift, or of one side that was seen in pretraining.
        is_truncated: Whether each record is cut to the training length, (n_records,).
        n_scored_tokens: Tokens of each record that carry loss, (n_records,).
        n_error_tokens: Those that the model before training predicts wrongly, (n_records,).
        confidence: Of all blind checks together, in (0, 1).
        seed: Seed of folds and permutations. The global random generators are not used.

    Raises:
        ConfigurationError: if an array does not hold one finite value per record, or `confidence` is outside
            (0, 1).
        MissingDependencyError: if datasketch is not installed.

    Source: Das et al. 2024, arXiv:2406.16201; Meeus et al. 2024, arXiv:2406.17975 (blind baselines).
    """
    if not 0 < confidence < 1:
        raise ConfigurationError(
            f"`confidence` is {confidence}, but it needs to lie in (0, 1): use 0.95 for 95 %."
        )
    given = {
        LOSS_BEFORE_TRAINING: _values(reference_losses, "reference_losses", canaries),
        "truncation": _values(is_truncated, "is_truncated", canaries),
        "number of scored tokens": _values(n_scored_tokens, "n_scored_tokens", canaries),
        _ERRORS_BEFORE_TRAINING: _values(n_error_tokens, "n_error_tokens", canaries),
    }
    blind = {"length": _lengths(canaries.records)} | {
        name: values for name, values in given.items() if values is not None
    }
    # Bonferroni: the word classifier is one more blind check.
    each = 1.0 - (1.0 - confidence) / (len(blind) + 1)
    checks: list[ValidityCheck] = [
        _blind_check(name, values, canaries, confidence=each) for name, values in blind.items()
    ]
    checks.insert(1, _word_check(canaries, confidence=each, seed=seed))
    checks += _near_duplicate_checks(canaries, training_records)
    for name, values, needed in (
        ("scored tokens", given["number of scored tokens"], MINIMUM_SCORED_TOKENS),
        (
            "wrongly predicted tokens",
            given[_ERRORS_BEFORE_TRAINING],
            MINIMUM_ERROR_TOKENS,
        ),
    ):
        if values is not None:
            checks.append(
                EvidenceCheck(
                    name=name,
                    n_needed=needed,
                    median=float(np.median(values)),
                    n_below=int(np.count_nonzero(values < needed)),
                    n_records=len(values),
                )
            )
    return ValidityReport(checks=tuple(checks), is_randomized=canaries.provenance.is_randomized)


def _values(values: ArrayLike | None, name: str, canaries: CanarySet) -> NDArray[np.float64] | None:
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(canaries),) or not np.isfinite(array).all():
        raise ConfigurationError(
            f"`{name}` has the shape {array.shape} and {np.count_nonzero(~np.isfinite(array))} values that "
            f"are not finite; one finite value for each of {len(canaries)} records is needed."
        )
    return array


def _lengths(records: Sequence[Record]) -> NDArray[np.float64]:
    """Return characters of texts, or tokens of tokenized rows, (n_records,)."""
    texts = [record_text(record) for record in records]
    return np.array(
        [
            len(record_units(record)) if text is None else len(text)
            for record, text in zip(records, texts, strict=True)
        ],
        dtype=np.float64,
    )


def _blind_check(
    name: str, values: NDArray[np.float64], canaries: CanarySet, *, confidence: float
) -> BlindCheck:
    return BlindCheck(
        name=name,
        auc=auc(values, canaries.is_member),
        interval=delong_interval(values, canaries.is_member, confidence=confidence),
        n_members=canaries.n_members,
        n_non_members=canaries.n_non_members,
    )


def _word_check(canaries: CanarySet, *, confidence: float, seed: int) -> BlindCheck:
    """Compare the words, by a classifier that is tested on records it was not trained on.

    The folds' classifiers share records, so that their pooled AUC varies more than DeLong's formula says: 1.5
    times as much at 100 records a side. The interval is widened by what permuted labels show.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(canaries))[:_MAX_CLASSIFIED])
    is_member = canaries.is_member[chosen]
    scores = _out_of_fold_scores([canaries.records[i] for i in chosen], is_member, rng)
    n_members, n_non_members = int(is_member.sum()), int((~is_member).sum())
    interval = delong_interval(scores.actual, is_member, confidence=confidence)
    center = auc(scores.actual, is_member)
    permuted, labels = scores.permuted
    # AUC is linear in the sum of the members' ranks.
    rank_sums = np.where(labels, scipy.stats.rankdata(permuted, axis=1), 0.0).sum(axis=1)
    spread = float(np.std(rank_sums)) / (n_members * n_non_members)
    widening = spread / hanley_mcneil_standard_error(0.5, n_members=n_members, n_non_members=n_non_members)
    return BlindCheck(
        name="words",
        auc=center,
        interval=_widened(interval, center, widening),
        n_members=n_members,
        n_non_members=n_non_members,
        is_trained=True,
    )


def _widened(interval: Interval, center: float, factor: float) -> Interval:
    # Bounds that are exact, for separated or constant scores, have no spread to be multiplied.
    if interval.method != "delong" or factor <= 1.0:
        return interval
    logits = scipy.special.logit([interval.lower, center, interval.upper])
    lower, upper = scipy.special.expit(logits[1] + factor * (logits[[0, 2]] - logits[1]))
    return Interval(float(lower), float(upper), interval.confidence, interval.method)


@dataclass(frozen=True, eq=False)
class _FoldScores:
    """Scores of records by classifiers that did not see them.

    Attributes:
        actual: (n_records,).
        permuted: Scores under permuted labels, and these labels, (n_permutations, n_records) each.
    """

    actual: NDArray[np.float64]
    permuted: tuple[NDArray[np.float64], NDArray[np.bool_]]


def _out_of_fold_scores(
    records: Sequence[Record], is_member: NDArray[np.bool_], rng: np.random.Generator
) -> _FoldScores:
    """Score records by ridge regression on which words they hold, in five stratified folds.

    Ridge regression, because one factorization serves all permutations. They stay within folds, which leaves
    the folds as stratified as they are.
    """
    # Imported here: a second that only checks need.
    from sklearn.model_selection import StratifiedKFold

    kernel = _word_kernel(records)
    labels = np.tile(is_member, (_N_PERMUTATIONS + 1, 1))
    scores = np.empty(labels.shape, dtype=np.float64)
    splitter = StratifiedKFold(_N_FOLDS, shuffle=True, random_state=int(rng.integers(2**31)))
    folds = list(splitter.split(np.zeros(len(records)), is_member))
    for _, tested in folds:
        labels[1:, tested] = rng.permuted(labels[1:, tested], axis=1)
    targets = np.where(labels, 1.0, -1.0).T
    for trained, tested in folds:
        regularized = kernel[np.ix_(trained, trained)] + _RIDGE * np.eye(len(trained))
        factor = scipy.linalg.cho_factor(regularized, lower=True, overwrite_a=True)
        weights = scipy.linalg.cho_solve(factor, targets[trained])
        scores[:, tested] = (kernel[np.ix_(tested, trained)] @ weights).T
    return _FoldScores(scores[0], (scores[1:], labels[1:]))


def _word_kernel(records: Sequence[Record]) -> NDArray[np.float64]:
    """Return the centered similarities of the records' sets of words, (n_records, n_records)."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    units = [record_units(record) for record in records]
    if not any(units):
        return np.zeros((len(records), len(records)))
    words: Any = CountVectorizer(analyzer=_identity, binary=True, dtype=np.float64).fit_transform(units)
    words = normalize(words)
    kernel: NDArray[np.float64] = (words @ words.T).toarray()
    kernel -= kernel.mean(axis=0)
    kernel -= kernel.mean(axis=1, keepdims=True)
    return kernel


def _identity(units: list[str]) -> list[str]:
    return units


def _near_duplicate_checks(
    canaries: CanarySet, training_records: Iterable[Record] | None
) -> list[ValidityCheck]:
    members = np.flatnonzero(canaries.is_member)
    member_ids = [canaries.record_ids[i] for i in members]
    among = [canaries.records[i] for i in members]
    checks: list[ValidityCheck] = [
        _near_duplicate_check("near copies among members", canaries, among, member_ids)
    ]
    if training_records is not None:
        checks.append(
            _near_duplicate_check("near copies among training rows", canaries, training_records, None)
        )
    return checks


def _near_duplicate_check(
    name: str, canaries: CanarySet, others: Iterable[Record], other_ids: Sequence[str] | None
) -> NearDuplicateCheck:
    non_members = np.flatnonzero(~canaries.is_member)
    counted = _Counted(others)
    found = near_duplicates([canaries.records[i] for i in non_members], counted)
    pairs = [
        (
            canaries.record_ids[non_members[pair.record]],
            f"row {pair.other}" if other_ids is None else other_ids[pair.other],
            round(pair.containment, 3),
        )
        for pair in found[:_MAX_PAIRS_KEPT]
    ]
    return NearDuplicateCheck(
        name=name,
        pairs=tuple(pairs),
        n_affected=len({pair.record for pair in found}),
        n_non_members=len(non_members),
        n_searched=counted.n_read,
    )


class _Counted:
    """Iterates over records, and counts them on the way: a generator has no length."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = records
        self.n_read = 0

    def __iter__(self) -> Iterator[Record]:
        for record in self._records:
            self.n_read += 1
            yield record
