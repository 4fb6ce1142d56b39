"""Membership scores of someone who holds the weights of every audit, not of the last one alone.

A record moves the model when it is fed, and what it did is diluted from then on. Whoever holds the model
before and after that moment compares the two, and sees what the final weights hardly show. Which moment it
was need not be known: see `checkpoint_holder_score`.

**What it is not.** A high figure says that the *sequence* of checkpoints leaks. It says nothing about the
final weights alone, so it never belongs into a budget on these. It also speaks of the checkpoints that were
scored, those of the audits: a holder of others, or of more, may see more.

**Epsilon.** The theorem on auditing in one run (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem
5.2 and corollary 5.4) is about any randomized function M that takes m independent fair coins and puts out,
for each, a guess or none. If M is (epsilon, delta)-DP with respect to each coin and makes r guesses, the
probability of v or more right ones is at most that of Bin(r, e^epsilon / (1 + e^epsilon)) >= v, plus a term
with delta (`one_run_p_value`). What training hands out does not enter. Let T(coins) = (w_0, ..., w_k) be the
weights at all audits: the scores and the guesses are functions of that sequence and of the canaries' text,
and of nothing else, so M is (epsilon, delta)-DP wherever T is. The theorem therefore covers a holder of
checkpoints, and its bound is one of **the epsilon of a pipeline that releases the whole sequence**. What it
takes:

* No guess looks at the coins. Ranks are taken among *all* canaries that are scored, never among those that
  were fed, or those of one class.
* The combination, its constant and the number of guesses were fixed on other data, before these scores were
  seen.
* Which audits there are belongs to T. Audits know the coins; a pipeline that they stop, or whose weights they
  put back, is the one that the bound speaks of, and a claim for the optimizer alone does not cover it.

How to read it. A lower bound for the sequence is none for the final weights, which are a function of it:
their epsilon may be smaller. The composition theorem behind the accounting of DP-SGD covers all iterates, so
a bound above the epsilon that it claims refutes the claim or its implementation. Claims for the last iterate
alone (amplification by iteration, hidden-state analyses) it cannot refute. Training without noise claims no
epsilon: the bound then says how private, at best, a pipeline that hands out these checkpoints could be
called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy

from ezmia_callbacks.errors import ConfigurationError

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

__all__: list[str] = []

# Decided on WikiText-2 and reported on other text by `benchmarks/checkpoint_holder.py`. A constant: whoever
# tunes it on the canaries that it is measured on has no epsilon.
_SHIFT = 3.0


def checkpoint_holder_score(
    step_scores: Float[np.ndarray, "n_steps n_records"],
) -> Float64[np.ndarray, " n_records"]:
    """Score of each record from its step scores: how far it stood out at one of them, whichever it was.

    A step score compares the model at an audit with that at the audit before it (the first one with the
    start): the EZ score with the earlier model as the reference. The records of each step become normal
    scores z, the normal quantiles of (rank - 1/2) / n_records, for the whole model moves further in some
    steps than in others; ties get their mean rank. Then a record's score is

        log( (1 / n_steps) * sum over steps of exp(3 z - 9/2) ),

    the log-likelihood ratio of "z is shifted by 3 at one of the steps, each as likely as the other" against
    "at none". It is close to the maximum of z, but without its ties, and a record that is fed once an epoch
    gains by each time.

    It depends on the records as a set: not on their order, and not on who is a member. One step gives the
    order of its own scores. A step at which nothing moved, all scores equal, changes no order. A member that
    was not fed yet at a step is like a non-member there.

    All steps are needed, not a sum over them: whoever keeps (n_steps, n_records) can go back to an earlier
    audit, or go on with some of the records alone. An audit that failed is left out, and the next one is
    compared with the last that did not.

    Args:
        step_scores: A row for each step; higher means more likely a member. Steps come in any order.

    Raises:
        ConfigurationError: if there is no step or no record, or a score is not finite.

    Source: the idea that a sequence of models avoids the dilution of the signal is SeMI*, Michel, Basu and
    Kaufmann 2026, arXiv:2602.16596, where it is optimal for means and its practical variants compare
    gradients or losses of successive models. EZ between successive audits, and this combination, are this
    package's own, chosen by `benchmarks/checkpoint_holder.py`.

    >>> first_quarter = [0.9, 0.5, 0.4, 0.6]
    >>> second_quarter = [0.3, 0.9, 0.5, 0.4]
    >>> checkpoint_holder_score(np.array([first_quarter, second_quarter])).round(2).tolist()
    [-1.74, -1.73, -4.23, -4.1]
    """
    scores = np.asarray(step_scores, dtype=np.float64)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ConfigurationError(
            f"`step_scores` has shape {scores.shape}, but it needs (n_steps, n_records) with at least one of "
            "each: pass a row for each audit after the start."
        )
    return EarlierSteps(scores[:-1]).score_with(scores[-1])


@dataclass(frozen=True, eq=False)
class EarlierSteps:
    """The step scores of the audits before one, most of them summed up: the next costs the same after any.

    Attributes:
        steps: float64, (n_steps, n_records): those that are not summed up yet.
        n_summed: Steps that are.
        sums: float64, (n_records,) each: what `sum_of_steps` gives of some of them.
    """

    steps: Float64[np.ndarray, "n_steps n_records"]
    n_summed: int = 0
    sums: Sequence[Float64[np.ndarray, " n_records"]] = ()

    @property
    def n_steps(self) -> int:
        """Number of steps, summed up or not."""
        return self.n_summed + len(self.steps)

    def score_with(self, step: Float64[np.ndarray, " n_records"]) -> Float64[np.ndarray, " n_records"]:
        """`checkpoint_holder_score` of all these steps and one more."""
        steps = np.concatenate([self.steps, step[np.newaxis]])
        combined: Float64[np.ndarray, " n_records"] = scipy.special.logsumexp(
            [*self.sums, sum_of_steps(steps)], axis=0
        ) - np.log(self.n_steps + 1)
        return combined


def sum_of_steps(
    step_scores: Float64[np.ndarray, "n_steps n_records"],
) -> Float64[np.ndarray, " n_records"]:
    """Logarithm of the sum over steps of exp(3 z - 9/2); see `checkpoint_holder_score`."""
    if not np.isfinite(step_scores).all():
        raise ConfigurationError(
            "`step_scores` holds NaN or infinity, but ranks need finite scores: leave out audits that failed."
        )
    ranks = scipy.stats.rankdata(step_scores, axis=1)
    normal = scipy.special.ndtri((ranks - 0.5) / step_scores.shape[1])
    log_ratios = _SHIFT * normal - _SHIFT**2 / 2.0
    combined: Float64[np.ndarray, " n_records"] = scipy.special.logsumexp(log_ratios, axis=0)
    return combined
