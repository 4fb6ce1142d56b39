"""Membership scores of records, computed from per-token log-probabilities.

All token arrays are flat: the scored tokens of all records one after the other, with
`offsets` (int64, n_records + 1) saying where each record starts and the last one ends.
`offsets=None` means that all tokens belong to one record. Log-probabilities are natural
logarithms. Every score is a float64 array with one entry per record, and **higher always means
more likely a member**.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from ezmia_callbacks.errors import ConfigurationError, EmptyRecordError, NonFiniteLogitsError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int, Int64, Shaped

__all__: list[str] = []

EzMode = Literal["ranked", "bounded", "paper_code"]

WBC_WINDOW_SIZES: tuple[int, ...] = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)
"""Window sizes of the released WBC code (the default)."""

WBC_WINDOW_SIZES_PAPER: tuple[int, ...] = tuple(round(2 * 20 ** (k / 9)) for k in range(10))
"""Window sizes by the formula of arXiv:2601.02751; they differ from the released code's list."""

# The denominator offset of the released WBC code's ratio attack, used here as a floor.
_MEAN_LOSS_FLOOR = 1e-8
# n * k may fall one rounding error short of an integer: 100 * 0.29 is 28.999999999999996.
_COUNT_ROUNDING = 1e-9


class _Records(NamedTuple):
    """Where each record lies in the flat token arrays; no record is empty."""

    starts: Int64[np.ndarray, " n_records"]
    lengths: Int64[np.ndarray, " n_records"]

    def sums(self, values: Float64[np.ndarray, " n_tokens"]) -> Float64[np.ndarray, " n_records"]:
        return np.asarray(np.add.reduceat(values, self.starts))

    def means(self, values: Float64[np.ndarray, " n_tokens"]) -> Float64[np.ndarray, " n_records"]:
        return np.asarray(self.sums(values) / self.lengths)

    def counts(self, mask: Bool[np.ndarray, " n_tokens"]) -> Int64[np.ndarray, " n_records"]:
        return np.asarray(np.add.reduceat(mask, self.starts, dtype=np.int64))

    def spread(self, values: Int64[np.ndarray, " n_records"]) -> Int64[np.ndarray, " n_tokens"]:
        return np.repeat(values, self.lengths)


@dataclass(frozen=True, eq=False)
class EzEvidence:
    """What the error tokens of each record say about membership.

    An error token is a scored token that is not the most likely one under the target model.
    The shift of a token is its log-probability under the target minus that under the reference.

    Attributes:
        positive: P, sum of the upward shifts over error tokens, in nats, >= 0.
        negative: N, sum of the sizes of downward shifts over error tokens, in nats, >= 0.
        n_errors: Number of error tokens of the target.
        n_reference_errors: Number of scored tokens that the reference does not rank first.
        n_tokens: Number of scored tokens.
        total_shift: Sum of the shifts over all scored tokens, errors or not, in nats.

    Raises:
        ConfigurationError: if the fields are not one-dimensional arrays of one length.

    Source: EZ-MIA, arXiv:2601.12104; the counts feed the edge rules of `ez_score`.

    >>> flags = np.array([True, False, False, True, False])
    >>> evidence = ez_evidence(
    ...     np.array([-0.5, -2.0, -3.0, -1.0, -4.0]),
    ...     np.array([-0.6, -3.0, -2.5, -1.2, -6.0]),
    ...     flags,
    ...     flags,
    ... )
    >>> evidence.positive.tolist(), evidence.negative.tolist(), evidence.n_errors.tolist()
    ([3.0], [0.5], [3])
    """

    positive: Float64[np.ndarray, " n_records"]
    negative: Float64[np.ndarray, " n_records"]
    n_errors: Int64[np.ndarray, " n_records"]
    n_reference_errors: Int64[np.ndarray, " n_records"]
    n_tokens: Int64[np.ndarray, " n_records"]
    total_shift: Float64[np.ndarray, " n_records"]

    def __post_init__(self) -> None:
        shapes = {field.name: np.shape(getattr(self, field.name)) for field in fields(self)}
        if len(set(shapes.values())) != 1 or len(shapes["positive"]) != 1:
            raise ConfigurationError(
                f"The fields of `EzEvidence` have shapes {shapes}, but each needs one entry per "
                "record: build it with `ez_evidence`."
            )

    @property
    def has_no_errors(self) -> Bool[np.ndarray, " n_records"]:
        """True where the target ranks every scored token first."""
        return np.asarray(self.n_errors == 0)

    @property
    def has_no_negative(self) -> Bool[np.ndarray, " n_records"]:
        """True where there are upward shifts on error tokens and no downward one."""
        return np.asarray((self.negative == 0) & (self.positive > 0))

    @property
    def is_low_evidence(self) -> Bool[np.ndarray, " n_records"]:
        """True where the score rests on a single error token."""
        return np.asarray(self.n_errors == 1)

    @property
    def is_top(self) -> Bool[np.ndarray, " n_records"]:
        """True where the bounded score is exactly 1: nothing speaks against membership.

        A record without target errors counts only if the reference made one: text that is
        trivial for both models says nothing.
        """
        return self.has_no_negative | (self.has_no_errors & (self.n_reference_errors > 0))


def ez_evidence(
    target_log_probs: Float[np.ndarray, " n_tokens"],
    reference_log_probs: Float[np.ndarray, " n_tokens"],
    target_is_correct: Bool[np.ndarray, " n_tokens"],
    reference_is_correct: Bool[np.ndarray, " n_tokens"],
    *,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
    tolerance: float = 1e-6,
) -> EzEvidence:
    """Shifts and counts on the tokens that the target model gets wrong, per record.

    Args:
        target_log_probs: Log-probability of each true token under the fine-tuned model, in nats.
        reference_log_probs: The same under the model before fine-tuning.
        target_is_correct: True where the true token is the target's most likely token.
        reference_is_correct: The same for the reference; used only to tell trivial text from
            text that was learned.
        offsets: Record boundaries in the flat token arrays; None means one record.
        tolerance: Shifts smaller than this, in nats, count as 0 in `positive` and `negative`:
            an untrained adapter in half precision shifts tokens by rounding noise alone.

    Raises:
        ConfigurationError: if lengths, offsets, types or the tolerance do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: arXiv:2601.12104, P and N of the EZ score over E = {argmax of the target is wrong}.

    >>> evidence = ez_evidence(
    ...     np.array([-2.0, -3.0]),
    ...     np.array([-3.0, -2.5]),
    ...     np.array([False, False]),
    ...     np.array([True, True]),
    ... )
    >>> evidence.total_shift.tolist()
    [0.5]
    """
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise ConfigurationError(
            f"`tolerance` is {tolerance}, but it needs to be a finite number of nats >= 0: "
            "use the default 1e-6, or 0 to keep every shift."
        )
    target, reference, records = _two_models(target_log_probs, reference_log_probs, offsets)
    n_tokens = len(target)
    is_error = ~_checked_flags(target_is_correct, name="target_is_correct", n_tokens=n_tokens)
    is_reference_error = ~_checked_flags(reference_is_correct, name="reference_is_correct", n_tokens=n_tokens)

    shifts = target - reference
    counted = np.where(is_error & (np.abs(shifts) >= tolerance), shifts, 0.0)
    return EzEvidence(
        positive=records.sums(np.maximum(counted, 0.0)),
        negative=records.sums(np.maximum(-counted, 0.0)),
        n_errors=records.counts(is_error),
        n_reference_errors=records.counts(is_reference_error),
        n_tokens=records.lengths,
        total_shift=records.sums(shifts),
    )


def ez_score(
    target_log_probs: Float[np.ndarray, " n_tokens"],
    reference_log_probs: Float[np.ndarray, " n_tokens"],
    target_is_correct: Bool[np.ndarray, " n_tokens"],
    reference_is_correct: Bool[np.ndarray, " n_tokens"],
    *,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
    mode: EzMode = "ranked",
    tolerance: float = 1e-6,
) -> Float64[np.ndarray, " n_records"]:
    """EZ score of each record: how far its error tokens moved up rather than down.

    Args:
        target_log_probs: Log-probability of each true token under the fine-tuned model, in nats.
        reference_log_probs: The same under the model before fine-tuning.
        target_is_correct: True where the true token is the target's most likely token.
        reference_is_correct: The same for the reference.
        offsets: Record boundaries in the flat token arrays; None means one record.
        mode: Rule for the score and its edge rows, see `ez_score_from_evidence`. "paper_code" leaves
            out the first token of each record, as the released code does: give it all predicted
            tokens of each text, the prediction of its second token first.
        tolerance: Shifts smaller than this, in nats, count as 0; the mode "paper_code" ignores
            it, as the released code has none.

    Raises:
        ConfigurationError: if lengths, offsets, types, mode or the tolerance do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: arXiv:2601.12104, EZ = P / N, here as f = P / (P + N), which has the same ROC.

    >>> is_correct = np.array([True, False, False, True, False])
    >>> target = np.array([-0.5, -2.0, -3.0, -1.0, -4.0])
    >>> reference = np.array([-0.6, -3.0, -2.5, -1.2, -6.0])
    >>> ez_score(target, reference, is_correct, is_correct).round(6).tolist()
    [0.857143]
    """
    _check_mode(mode)
    if mode == "paper_code":
        tolerance = 0.0
        target_is_correct = _without_first_errors(
            target_is_correct, offsets, n_tokens=np.size(target_log_probs)
        )
    evidence = ez_evidence(
        target_log_probs,
        reference_log_probs,
        target_is_correct,
        reference_is_correct,
        offsets=offsets,
        tolerance=tolerance,
    )
    return ez_score_from_evidence(evidence, mode=mode)


def ez_score_from_evidence(
    evidence: EzEvidence, *, mode: EzMode = "ranked"
) -> Float64[np.ndarray, " n_records"]:
    """EZ score of each record, from its summed evidence.

    The modes differ in their edge rows:

    * "bounded", in [0, 1]: f = P / (P + N). Where P + N = 0, f is 0.5: the models agree. A record
      without target errors is 1 if the reference made an error on it, else 0.5.
    * "ranked", in [0, 2]: as "bounded", but rows with f = 1 become 1 + (1 + s / (1 + |s|)) / 2,
      with s the mean shift of all scored tokens. Such rows would otherwise tie, and a few
      non-members in the tie make the true-positive rate at low false-positive rates read 0, a
      wrong "no leakage". The mean, for a sum would order them by their length.
    * "paper_code": P / (N + 1e-12), and 0 with fewer than 2 errors or N = 0, as in the released
      code. It ranks fully memorized records *last*: for parity tests only. The evidence must
      have been made with `tolerance=0`, and with the first token of each record marked as
      correct, since the released code leaves that out; `ez_score` does both.

    Args:
        evidence: Sums and counts of each record, from `ez_evidence`.
        mode: One of the modes above.

    Raises:
        ConfigurationError: if the mode is unknown.

    Source: arXiv:2601.12104 (score; zero-error and N = 0 rows rank as members in its appendix);
    code rule from github.com/JetBrains-Research/ez-mia, re-implemented. The 0.5 rows and the
    order of the top rows are this package's own.

    >>> is_correct = np.array([False, False])
    >>> all_up = ez_evidence(
    ...     np.array([-1.0, -2.0]), np.array([-2.0, -3.0]), is_correct, is_correct
    ... )
    >>> [round(ez_score_from_evidence(all_up, mode=m).item(), 3) for m in get_args(EzMode)]
    [1.75, 1.0, 0.0]
    """
    _check_mode(mode)
    positive, negative = evidence.positive, evidence.negative
    if mode == "paper_code":
        is_scored = (evidence.n_errors >= 2) & (negative > 0)
        return np.where(is_scored, positive / (negative + 1e-12), 0.0)

    total = positive + negative
    fraction = np.divide(positive, total, out=np.full(len(total), 0.5), where=total > 0)
    # A tiny N rounds P / (P + N) to 1, which only rows without any N may have.
    fraction = np.where(evidence.is_top, 1.0, np.minimum(fraction, np.nextafter(1.0, 0.0)))
    if mode == "bounded":
        return fraction
    shift = evidence.total_shift / evidence.n_tokens
    top_score = 1.0 + (1.0 + shift / (1.0 + np.abs(shift))) / 2.0
    return np.where(evidence.is_top, np.maximum(top_score, np.nextafter(1.0, 2.0)), fraction)


def loss_score(
    log_probs: Float[np.ndarray, " n_tokens"],
    *,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Mean log-probability of each record's tokens (minus its loss), in nats.

    Args:
        log_probs: Log-probability of each true token under the model, in nats.
        offsets: Record boundaries in the flat token arrays; None means one record.

    Raises:
        ConfigurationError: if lengths or offsets do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: the loss attack of Yeom et al. 2018, arXiv:1709.01604.

    >>> loss_score(np.array([-1.0, -2.0, -4.0]), offsets=np.array([0, 2, 3])).tolist()
    [-1.5, -4.0]
    """
    values = _checked_tokens(log_probs, name="log_probs")
    return _checked_records(offsets, n_tokens=len(values)).means(values)


def loss_difference_score(
    target_log_probs: Float[np.ndarray, " n_tokens"],
    reference_log_probs: Float[np.ndarray, " n_tokens"],
    *,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Mean over tokens of target minus reference log-probability, in nats.

    Args:
        target_log_probs: Log-probability of each true token under the fine-tuned model, in nats.
        reference_log_probs: The same under the reference model.
        offsets: Record boundaries in the flat token arrays; None means one record.

    Raises:
        ConfigurationError: if lengths or offsets do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: the loss ratio in log space of arXiv:2402.17012.

    >>> loss_difference_score(np.array([-1.0, -2.0]), np.array([-2.0, -2.0])).tolist()
    [0.5]
    """
    target, reference, records = _two_models(target_log_probs, reference_log_probs, offsets)
    return records.means(target - reference)


def margin_score(
    target_chosen: Float[np.ndarray, " n_chosen_tokens"],
    reference_chosen: Float[np.ndarray, " n_chosen_tokens"],
    target_rejected: Float[np.ndarray, " n_rejected_tokens"],
    reference_rejected: Float[np.ndarray, " n_rejected_tokens"],
    *,
    chosen_offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
    rejected_offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Margin of each preference pair, in nats: how much further the chosen side moved up than the rejected.

    The sum over the chosen side's tokens of target minus reference log-probability, minus the same sum over
    the rejected side. It is what DPO raises, divided by its beta (`rewards/margins` in TRL). Sums, not means:
    tokens which both sides begin with cancel, so that a pair that differs in one token is judged by it and by
    what follows. On other pairs their AUC was up to 0.07 above that of means and at most 0.003 below it,
    under losses that divide by the length, too (`benchmarks/preference_margin.py`).

    Args:
        target_chosen: Log-probability of each token of the chosen sides under the fine-tuned model, in nats.
        reference_chosen: The same under the reference model.
        target_rejected: Of the rejected sides, under the fine-tuned model.
        reference_rejected: The same under the reference model.
        chosen_offsets: Borders of the chosen sides in their flat arrays; None means one pair.
        rejected_offsets: Borders of the rejected sides in theirs, in the same order.

    Raises:
        ConfigurationError: if lengths or offsets do not fit, or one side has more records than the other.
        EmptyRecordError: if a side has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: Rafailov et al. 2023, arXiv:2305.18290: the difference of two implicit rewards (eq. 5 and 6, where
    the partition function cancels), inside the sigmoid of the loss (eq. 7), without its factor beta.

    >>> margin_score(
    ...     np.array([-1.0, -2.0]), np.array([-1.5, -2.0]), np.array([-4.0]), np.array([-3.0])
    ... ).tolist()
    [1.5]
    """
    chosen = _two_models(target_chosen, reference_chosen, chosen_offsets)
    rejected = _two_models(target_rejected, reference_rejected, rejected_offsets)
    n_pairs = [len(records.starts) for _, _, records in (chosen, rejected)]
    if n_pairs[0] != n_pairs[1]:
        raise ConfigurationError(
            f"Got {n_pairs[0]} chosen sides and {n_pairs[1]} rejected ones: pass both sides of every pair."
        )
    moved = [records.sums(target - reference) for target, reference, records in (chosen, rejected)]
    return np.asarray(moved[0] - moved[1])


def ratio_score(
    target_log_probs: Float[np.ndarray, " n_tokens"],
    reference_log_probs: Float[np.ndarray, " n_tokens"],
    *,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Minus the ratio of the mean target loss to the mean reference loss, at most 0.

    Both mean losses are floored at 1e-8 nats. Two models that are both certain of a record then
    score -1 like any two models that agree; adding the offset to the denominator alone, as
    the released WBC code does, would score such a record 0, the strongest member.

    Args:
        target_log_probs: Log-probability of each true token under the fine-tuned model, in nats.
        reference_log_probs: The same under the reference model.
        offsets: Record boundaries in the flat token arrays; None means one record.

    Raises:
        ConfigurationError: if lengths or offsets do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: idea of Carlini et al. 2021, arXiv:2012.07805; form of the released WBC code.

    >>> ratio_score(np.array([-1.0, -2.0]), np.array([-2.0, -4.0])).tolist()
    [-0.5]
    """
    target, reference, records = _two_models(target_log_probs, reference_log_probs, offsets)
    target_loss = np.maximum(-records.means(target), _MEAN_LOSS_FLOOR)
    reference_loss = np.maximum(-records.means(reference), _MEAN_LOSS_FLOOR)
    return np.asarray(-target_loss / reference_loss)


def zlib_score(
    log_probs: Float[np.ndarray, " n_tokens"],
    *,
    n_compressed_bytes: Int[np.ndarray, " n_records"],
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Mean log-probability of each record divided by its zlib-compressed size, in nats per byte.

    The value is at most 0 and nearer to 0 means more likely a member. A mean divided by a size
    favors long records at equal loss: compare records of similar length only.

    Args:
        log_probs: Log-probability of each true token under the model, in nats.
        n_compressed_bytes: Size of each record's zlib-compressed UTF-8 text, in bytes, >= 1.
        offsets: Record boundaries in the flat token arrays; None means one record.

    Raises:
        ConfigurationError: if lengths, offsets or sizes do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: Carlini et al. 2021, arXiv:2012.07805, in the convention of mimir (compressed bytes,
    not bytes per character, which ranks records of different lengths otherwise).

    >>> zlib_score(np.array([-1.0, -3.0]), n_compressed_bytes=np.array([40])).tolist()
    [-0.05]
    """
    values = _checked_tokens(log_probs, name="log_probs")
    records = _checked_records(offsets, n_tokens=len(values))
    sizes = np.asarray(n_compressed_bytes)
    if sizes.shape != records.lengths.shape or not np.issubdtype(sizes.dtype, np.integer):
        raise ConfigurationError(
            f"`n_compressed_bytes` has shape {sizes.shape} and type {sizes.dtype}, but "
            f"{len(records.lengths)} records need one integer each: pass "
            "`len(zlib.compress(text.encode()))` of every record."
        )
    if np.any(sizes < 1):
        raise ConfigurationError(
            f"`n_compressed_bytes` holds {sizes.min()}, but a compressed text has at least 1 byte: "
            "pass `len(zlib.compress(text.encode()))` of every record."
        )
    return np.asarray(records.means(values) / sizes)


def min_k_score(
    log_probs: Float[np.ndarray, " n_tokens"],
    *,
    k: float = 0.2,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Mean of the lowest fraction `k` of each record's log-probabilities, in nats.

    The number of tokens is max(1, floor(n * k)), so that short records still get a score.

    Args:
        log_probs: Log-probability of each true token under the model, in nats.
        k: Fraction of tokens to keep, in (0, 1].
        offsets: Record boundaries in the flat token arrays; None means one record.

    Raises:
        ConfigurationError: if lengths, offsets or `k` do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: Min-K% of Shi et al. 2024, arXiv:2310.16789.

    >>> min_k_score(np.array([-1.0, -5.0, -2.0, -3.0]), k=0.5).tolist()
    [-4.0]
    """
    values = _checked_tokens(log_probs, name="log_probs")
    return _lowest_mean(values, _checked_records(offsets, n_tokens=len(values)), k=k)


class TokenMoments(NamedTuple):
    """What Min-K%++ needs from one model: true-token log-probabilities and vocabulary moments.

    Attributes:
        log_probs: Log-probability of each true token, in nats.
        means: Probability-weighted mean of the log-probability over the vocabulary, in nats.
        stds: Its probability-weighted standard deviation, in nats, >= 0.
    """

    log_probs: Float[np.ndarray, " n_tokens"]
    means: Float[np.ndarray, " n_tokens"]
    stds: Float[np.ndarray, " n_tokens"]


def min_k_plus_plus_score(
    log_probs: Float[np.ndarray, " n_tokens"],
    means: Float[np.ndarray, " n_tokens"],
    stds: Float[np.ndarray, " n_tokens"],
    *,
    k: float = 0.2,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Mean of the lowest fraction `k` of each record's standardized log-probabilities.

    A token is standardized as z = (log p - mean) / std. Where std is 0 the distribution is flat
    over its support, the token is as likely as expected, and z is 0.

    Args:
        log_probs: Log-probability of each true token under the model, in nats.
        means: Mean of the log-probability at each position, weighted by probability, in nats.
        stds: Its standard deviation, weighted by probability, in nats, >= 0.
        k: Fraction of tokens to keep, in (0, 1].
        offsets: Record boundaries in the flat token arrays; None means one record.

    Raises:
        ConfigurationError: if lengths, offsets, `stds` or `k` do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if an input is NaN or infinite.

    Source: Min-K%++ of Zhang et al. 2025, arXiv:2404.02936; moments weighted by probability as
    in the authors' and mimir's code.

    >>> third = np.log(1 / 3)
    >>> min_k_plus_plus_score(np.array([third]), np.array([third]), np.array([0.0])).tolist()
    [0.0]
    """
    values = _checked_tokens(log_probs, name="log_probs")
    records = _checked_records(offsets, n_tokens=len(values))
    centers = _checked_tokens(means, name="means", n_tokens=len(values))
    scales = _checked_tokens(stds, name="stds", n_tokens=len(values))
    if np.any(scales < 0):
        raise ConfigurationError(
            f"`stds` holds {scales.min():.3g}, but a standard deviation is never negative: clip "
            "the variance at 0 before its square root."
        )
    standardized = np.divide(values - centers, scales, out=np.zeros(len(values)), where=scales > 0)
    return _lowest_mean(standardized, records, k=k)


def calibrated_min_k_plus_plus_score(
    target: TokenMoments,
    reference: TokenMoments,
    *,
    k: float = 0.2,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Min-K%++ of each record under the target minus that under the reference.

    Each model picks its own lowest tokens.

    Args:
        target: Token statistics of the fine-tuned model.
        reference: Token statistics of the reference model, for the same tokens.
        k: Fraction of tokens to keep, in (0, 1].
        offsets: Record boundaries in the flat token arrays; None means one record.

    Raises:
        ConfigurationError: if lengths, offsets, `stds` or `k` do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if an input is NaN or infinite.

    Source: calibration of LoRA-Leak, arXiv:2507.18302, on arXiv:2404.02936.

    >>> target = TokenMoments(np.array([-1.0]), np.array([-2.0]), np.array([1.0]))
    >>> reference = TokenMoments(np.array([-3.0]), np.array([-2.0]), np.array([2.0]))
    >>> calibrated_min_k_plus_plus_score(target, reference).tolist()
    [1.5]
    """
    _check_same_length(target.log_probs, reference.log_probs)
    target_score = min_k_plus_plus_score(*target, k=k, offsets=offsets)
    reference_score = min_k_plus_plus_score(*reference, k=k, offsets=offsets)
    return np.asarray(target_score - reference_score)


def wbc_score(
    target_log_probs: Float[np.ndarray, " n_tokens"],
    reference_log_probs: Float[np.ndarray, " n_tokens"],
    *,
    window_sizes: Sequence[int] = WBC_WINDOW_SIZES,
    offsets: Int[np.ndarray, " n_records_plus_1"] | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Share of each record's token windows whose summed shift is positive, in [0, 1].

    The share is taken within a window size first and then averaged over the sizes. A window
    longer than the record is cut to the record. A sum of exactly 0 does not count.

    Args:
        target_log_probs: Log-probability of each true token under the fine-tuned model, in nats.
        reference_log_probs: The same under the reference model.
        window_sizes: Window lengths, in tokens, each >= 1.
        offsets: Record boundaries in the flat token arrays; None means one record.

    Raises:
        ConfigurationError: if lengths, offsets or window sizes do not fit.
        EmptyRecordError: if a record has no scored token.
        NonFiniteLogitsError: if a log-probability is NaN or infinite.

    Source: window-based comparison, arXiv:2601.02751; strict sign and default sizes of its
    released code.

    >>> shifts = np.array([0.1, -0.3, 0.25, 0.4, -1.0])
    >>> wbc_score(shifts, np.zeros(5), window_sizes=[2]).tolist()
    [0.25]
    """
    if len(window_sizes) == 0 or any(size < 1 or size != int(size) for size in window_sizes):
        raise ConfigurationError(
            f"`window_sizes` is {list(window_sizes)}, but it needs at least one whole number >= 1: "
            "use `WBC_WINDOW_SIZES`."
        )
    target, reference, records = _two_models(target_log_probs, reference_log_probs, offsets)
    shifts = target - reference
    positions = np.arange(len(shifts)) - records.spread(records.starts)
    n_remaining = records.spread(records.lengths) - positions
    is_positive_overall = records.sums(shifts) > 0

    total = np.zeros(len(records.lengths))
    for size in window_sizes:
        sums = _window_sums(shifts, int(size))
        is_positive = np.zeros(len(shifts), dtype=np.bool_)
        # Windows that leave their record are summed over foreign tokens, and never counted.
        is_positive[: len(sums)] = (sums > 0) & (n_remaining[: len(sums)] >= size)
        n_windows = records.lengths - int(size) + 1
        share = records.counts(is_positive) / np.maximum(n_windows, 1)
        total += np.where(n_windows >= 1, share, is_positive_overall)
    return total / len(window_sizes)


def _window_sums(values: Float64[np.ndarray, " n_tokens"], size: int) -> Float64[np.ndarray, " n_windows"]:
    """Sums of all windows of `size` values; empty if there are fewer values.

    Built from windows of doubling length, in O(n log size). Differences of one long running sum
    would be cheaper by a constant, but they cancel: a sum that is exactly 0 could come out
    positive, and a record's score would depend on the records before it.
    """
    n_windows = len(values) - size + 1
    if n_windows < 1:
        return np.zeros(0)
    sums = np.zeros(n_windows)
    block_sums, block_size, n_summed = values, 1, 0
    while True:
        if size & block_size:
            sums += block_sums[n_summed : n_summed + n_windows]
            n_summed += block_size
        if 2 * block_size > size:
            return sums
        block_sums = block_sums[:-block_size] + block_sums[block_size:]
        block_size *= 2


def _lowest_mean(
    values: Float64[np.ndarray, " n_tokens"], records: _Records, *, k: float
) -> Float64[np.ndarray, " n_records"]:
    """Mean of the lowest max(1, floor(n * k)) values of each record."""
    if not 0 < k <= 1:
        raise ConfigurationError(
            f"`k` is {k}, but it is the fraction of tokens to keep, in (0, 1]: use 0.2 for 20 %."
        )
    means = np.empty(len(records.lengths))
    # One matrix per record length: several times faster than one ragged sort.
    for length in np.unique(records.lengths):
        rows = np.flatnonzero(records.lengths == length)
        tokens = values[records.starts[rows, np.newaxis] + np.arange(length)]
        n_kept = max(1, int(length * k + _COUNT_ROUNDING))
        lowest = np.partition(tokens, n_kept - 1, axis=1)[:, :n_kept]
        means[rows] = lowest.mean(axis=1)
    return means


def _two_models(
    target_log_probs: Float[np.ndarray, " n_tokens"],
    reference_log_probs: Float[np.ndarray, " n_tokens"],
    offsets: Int[np.ndarray, " n_records_plus_1"] | None,
) -> tuple[Float64[np.ndarray, " n_tokens"], Float64[np.ndarray, " n_tokens"], _Records]:
    _check_same_length(target_log_probs, reference_log_probs)
    target = _checked_tokens(target_log_probs, name="target_log_probs")
    reference = _checked_tokens(reference_log_probs, name="reference_log_probs")
    return target, reference, _checked_records(offsets, n_tokens=len(target))


def _check_same_length(
    target_log_probs: Float[np.ndarray, " n_target"],
    reference_log_probs: Float[np.ndarray, " n_reference"],
) -> None:
    if np.shape(target_log_probs) != np.shape(reference_log_probs):
        raise ConfigurationError(
            f"The target's tokens have shape {np.shape(target_log_probs)}, the reference's "
            f"{np.shape(reference_log_probs)}: score both models on the same tokens."
        )


def _checked_tokens(
    values: Float[np.ndarray, " n_tokens"], *, name: str, n_tokens: int | None = None
) -> Float64[np.ndarray, " n_tokens"]:
    checked = np.asarray(values, dtype=np.float64)
    _check_layout(checked, name=name, n_tokens=n_tokens)
    n_bad = int(np.count_nonzero(~np.isfinite(checked)))
    if n_bad:
        first = int(np.argmin(np.isfinite(checked)))
        raise NonFiniteLogitsError(
            f"`{name}` is {checked[first]} at flat token {first} ({n_bad} of {len(checked)} tokens "
            "are not finite): check the model for overflow, or compute its log-softmax in float32."
        )
    return checked


def _checked_flags(
    values: Bool[np.ndarray, " n_tokens"], *, name: str, n_tokens: int
) -> Bool[np.ndarray, " n_tokens"]:
    checked = np.asarray(values)
    _check_layout(checked, name=name, n_tokens=n_tokens)
    if checked.dtype != np.bool_:
        raise ConfigurationError(
            f"`{name}` has type {checked.dtype}, but it needs booleans: pass "
            "`argmax == token`, not token ids."
        )
    return checked


def _check_layout(values: Shaped[np.ndarray, " ..."], *, name: str, n_tokens: int | None) -> None:
    if values.ndim != 1:
        raise ConfigurationError(
            f"`{name}` has shape {values.shape}, but tokens are needed flat: concatenate the "
            "scored tokens of all records and pass `offsets`."
        )
    if n_tokens is not None and len(values) != n_tokens:
        raise ConfigurationError(
            f"`{name}` has {len(values)} tokens, but the log-probabilities have {n_tokens}: "
            "pass one entry per scored token."
        )


def _checked_records(offsets: Int[np.ndarray, " n_records_plus_1"] | None, *, n_tokens: int) -> _Records:
    boundaries = np.array([0, n_tokens]) if offsets is None else np.asarray(offsets)
    if boundaries.ndim != 1 or len(boundaries) == 0 or not np.issubdtype(boundaries.dtype, np.integer):
        raise ConfigurationError(
            f"`offsets` has shape {boundaries.shape} and type {boundaries.dtype}, but it needs "
            "n_records + 1 integers: pass the cumulative token counts, starting with 0."
        )
    boundaries = boundaries.astype(np.int64)
    lengths = np.diff(boundaries)
    if boundaries[0] != 0 or boundaries[-1] != n_tokens or np.any(lengths < 0):
        raise ConfigurationError(
            f"`offsets` runs from {boundaries[0]} to {boundaries[-1]}, but it needs to rise from 0 "
            f"to the {n_tokens} tokens given: pass the cumulative token counts, starting with 0."
        )
    n_empty = int(np.count_nonzero(lengths == 0))
    if n_empty:
        raise EmptyRecordError(
            f"Record {int(np.argmin(lengths))} has no scored token ({n_empty} of {len(lengths)} "
            "records), but each needs one: remove records whose tokens are all masked."
        )
    return _Records(starts=boundaries[:-1], lengths=lengths)


def _without_first_errors(
    is_correct: Bool[np.ndarray, " n_tokens"],
    offsets: Int[np.ndarray, " n_records_plus_1"] | None,
    *,
    n_tokens: int,
) -> Bool[np.ndarray, " n_tokens"]:
    """The flags with the first token of each record taken for correct, so that it is no error token."""
    flags = np.array(_checked_flags(is_correct, name="target_is_correct", n_tokens=n_tokens))
    flags[_checked_records(offsets, n_tokens=n_tokens).starts] = True
    return flags


def _check_mode(mode: str) -> None:
    if mode not in get_args(EzMode):
        raise ConfigurationError(
            f"`mode` is {mode!r}, but it needs to be one of {', '.join(get_args(EzMode))}: "
            "use the default 'ranked' unless you compare with published code."
        )
