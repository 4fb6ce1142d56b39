"""How likely a model is to emit a record word for word, from one teacher-forced pass: nothing is generated.

The probability of sampling a suffix, at temperature 1 and without top-k or top-p, is the product of its
tokens' probabilities given the true context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.errors import ConfigurationError

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

__all__: list[str] = []


def suffix_log_probability(
    log_probs: Float[np.ndarray, " n_tokens"],
    *,
    offsets: Int64[np.ndarray, " n_records_plus_1"],
    n_suffix_tokens: int | None = None,
) -> Float64[np.ndarray, " n_records"]:
    """Log-probability, in nats, of sampling the end of each record after its true beginning.

    Args:
        log_probs: Natural log-probability of each scored token, all records one after the other.
        offsets: The tokens of record `i` are `offsets[i]:offsets[i + 1]`.
        n_suffix_tokens: Number of last scored tokens that count, >= 1; None for all. Shorter records count
            whole.

    Raises:
        ConfigurationError: if `n_suffix_tokens` is below 1, or a record has no tokens.

    >>> suffix_log_probability(np.log([0.5, 0.5, 0.1]), offsets=np.array([0, 2, 3])).round(4).tolist()
    [-1.3863, -2.3026]
    """
    if n_suffix_tokens is not None and n_suffix_tokens < 1:
        raise ConfigurationError(f"`n_suffix_tokens` must be at least 1 or None, got {n_suffix_tokens!r}.")
    starts, ends = np.asarray(offsets[:-1]), np.asarray(offsets[1:])
    if (starts >= ends).any():
        raise ConfigurationError("Every record needs at least one scored token: remove empty records.")
    firsts = starts if n_suffix_tokens is None else np.maximum(starts, ends - n_suffix_tokens)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(log_probs, dtype=np.float64))])
    result: Float64[np.ndarray, " n_records"] = np.minimum(sums[ends] - sums[firsts], 0.0)
    return result


def extraction_probability(
    log_probability: Float[np.ndarray, " n_records"], *, n_attempts: int
) -> Float64[np.ndarray, " n_records"]:
    """Probability that at least one of so many samples is the record.

    Args:
        log_probability: Of one sample, in nats, <= 0; see `suffix_log_probability`.
        n_attempts: Number of independent samples, >= 1.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: Hayes et al. 2024, arXiv:2410.19482: 1 - (1 - p)^n.

    >>> extraction_probability(np.log([0.1]), n_attempts=10).round(4).tolist()
    [0.6513]
    """
    if n_attempts < 1:
        raise ConfigurationError(f"`n_attempts` must be at least 1, got {n_attempts!r}.")
    result: Float64[np.ndarray, " n_records"] = -np.expm1(n_attempts * _log_of_failing(log_probability))
    return result


def attempts_needed(
    log_probability: Float[np.ndarray, " n_records"], *, probability: float
) -> Float64[np.ndarray, " n_records"]:
    """Number of samples after which the record has been emitted with a given probability.

    Args:
        log_probability: Of one sample, in nats, <= 0.
        probability: In (0, 1).

    Returns:
        Whole numbers as float64, at least 1; infinite where the record is never emitted.

    Raises:
        ConfigurationError: if an argument is outside its range.

    Source: Hayes et al. 2024, arXiv:2410.19482: n = log(1 - probability) / log(1 - p).

    >>> attempts_needed(np.log([0.1, 1.0]), probability=0.5).tolist()
    [7.0, 1.0]
    """
    if not 0.0 < probability < 1.0:
        raise ConfigurationError(f"`probability` must lie in (0, 1), got {probability!r}.")
    with np.errstate(divide="ignore"):
        attempts = np.log1p(-probability) / _log_of_failing(log_probability)
    result: Float64[np.ndarray, " n_records"] = np.maximum(np.ceil(attempts), 1.0)
    return result


def _log_of_failing(log_probability: Float[np.ndarray, " n_records"]) -> Float64[np.ndarray, " n_records"]:
    values = np.asarray(log_probability, dtype=np.float64)
    if not (values <= 0.0).all():
        raise ConfigurationError("A log-probability is NaN or above 0: pass natural logarithms.")
    with np.errstate(divide="ignore"):
        return np.where(values == 0.0, -np.inf, np.log1p(-np.exp(np.minimum(values, -1e-300))))
