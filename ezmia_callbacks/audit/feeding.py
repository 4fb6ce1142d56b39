"""What the batches of the training say about the canaries, in words, and which canaries figures may count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.measuring.figures import Counted
from ezmia_callbacks.results.exposures import Exposures
from ezmia_callbacks.results.result import Finding

if TYPE_CHECKING:
    from jaxtyping import Bool

    from ezmia_callbacks.scoring.rows import EncodedCanaries

__all__: list[str] = []

CONTAMINATION = "contamination"
NEVER_FED = "members never fed"
_N_NAMED = 5
_OTHER_ANSWER = ", a chosen side trained on with another rejected one"
# Of a non-member's tokens: less may be a phrase that anybody uses.
_LARGE_SHARE = 0.5

_ADVICE = (
    "The training loop may call another object than the one that is watched, call it in evaluation mode, or "
    "inside a compiled function: give "
    "`PrivacyAuditor.watch` the object that the training loop calls, or pass `assume_seen=True` if you "
    "know that the members are trained on and the non-members are not."
)


def counted_by(exposures: Exposures, is_member: Bool[np.ndarray, " n_records"]) -> Counted:
    """The records that figures may count: members that were fed whole, and non-members that were not fed.

    Args:
        exposures: What was fed of each record.
        is_member: Which of them are members.
    """
    is_fed = exposures.is_seen | exposures.is_seen_in_pieces
    return Counted(np.where(is_member, exposures.is_seen, ~is_fed), exposures.last_step)


def why_not_seen(exposures: Exposures, is_member: Bool[np.ndarray, " n_records"]) -> str:
    """Why nothing is known of any member; empty if something is."""
    if exposures.problem or not exposures.n_batches:
        return exposures.problem or "no batch was seen"
    if not (exposures.is_seen & is_member).any():
        return f"of {exposures.n_batches} batches none held a whole member"
    return ""


def findings_of_feeding(
    exposures: Exposures, encoded: EncodedCanaries, *, epoch: float | None, otherwise: str = ""
) -> tuple[Finding, ...]:
    """What a reader of the figures must know about what was fed; nothing if all is as it should be.

    * "batches not seen": nothing is known of what was fed.
    * "not scored as fed": the model gets something in training that the audit does not give it.
    * "contamination": non-members were fed. They count nowhere from then on.
    * "non-members fed in part": near copies of them, or pieces, are trained on.
    * "members never fed": after a whole epoch some members were never in a batch, or never whole.

    Args:
        exposures: What was fed of each record that is scored.
        encoded: These records.
        epoch: Epochs done; None if unknown: then nothing can be said to be missing yet.
        otherwise: What `scored_otherwise` found.
    """
    is_member, ids = encoded.is_member, encoded.record_ids
    if exposures.problem or not exposures.n_batches:
        text = f"Leakage is unknown: {why_not_seen(exposures, is_member)}. {_ADVICE}"
        return (Finding("batches not seen", True, text),)
    found = []
    if otherwise:
        found.append(Finding("not scored as fed", True, f"Leakage may read too low: {otherwise}."))
    is_contaminated = ~is_member & (exposures.is_seen | exposures.is_seen_in_pieces)
    if is_contaminated.any():
        n = int(is_contaminated.sum())
        text = (
            f"{_counted(n, 'non-member was', 'non-members were')} fed in training: "
            f"{_named(ids, is_contaminated)}. They are taken out of the figures, which would read too low. "
            "Train on the dataset that `hold_out_canaries` returned."
        )
        if encoded.has_pairs:
            text += (
                " Of a preference pair one side is enough, in another pair: keep pairs that share an answer "
                "together with `group_by`."
            )
        found.append(Finding(CONTAMINATION, True, text))
    is_near = ~is_member & ~is_contaminated & (exposures.share >= _LARGE_SHARE)
    if is_near.any():
        n = int(is_near.sum())
        text = (
            f"{_counted(n, 'non-member was', 'non-members were')} fed in large part: "
            f"{_named(ids, is_near)}. Near copies of them, or pieces, are trained on, so that figures may "
            "read too low: look for near copies before the split."
        )
        found.append(Finding("non-members fed in part", True, text))
    is_missing = is_member & ~exposures.is_seen
    if epoch is not None and epoch >= 1.0 and is_missing.any():
        found.append(Finding(NEVER_FED, True, describe_never_fed(exposures, encoded)))
    return tuple(found)


def scored_otherwise(
    further_inputs: frozenset[str], encoded: EncodedCanaries, *, is_left_padded: bool, is_shifted: bool
) -> str:
    """In what the audit calls the model otherwise than training does; empty if in nothing.

    Args:
        further_inputs: Tensors that training calls the model with, besides token ids, mask and labels.
        encoded: The canaries, with what scoring hands to the model.
        is_left_padded: Whether rows of training began with padding.
        is_shifted: Whether training gave a canary positions that do not count from 0.
    """
    missing = further_inputs - encoded.input_names - {"position_ids"}
    if missing:
        return (
            f"training calls the model with {', '.join(sorted(missing))}, and the audit does not: pass a "
            "`logits_fn` that calls it as training does"
        )
    if "position_ids" in encoded.input_names or encoded.padding_side == "left":
        return ""
    if is_shifted or (is_left_padded and "position_ids" not in further_inputs):
        return (
            "training gives the model records whose positions do not begin at 0 (padding on the left?), and "
            "the audit does not: pad on the right, or pass a `logits_fn` that calls it as training does"
        )
    return ""


def describe_never_fed(exposures: Exposures, encoded: EncodedCanaries) -> str:
    """Which members training never fed whole, and why that may be; empty if it fed all."""
    is_member = encoded.is_member
    is_missing = is_member & ~exposures.is_seen
    n, n_partly = int(is_missing.sum()), int((is_missing & exposures.is_seen_in_part).sum())
    if not n:
        return ""
    partly = f" (of {n_partly} a part)" if n_partly else ""
    return (
        f"{n} of {int(is_member.sum())} members were never fed whole{partly}: "
        f"{_named(encoded.record_ids, is_missing)}. They count nowhere. Likely causes: a sampler or a limit "
        "on the number of batches that leaves rows out, truncation or packing that cuts records, another "
        f"template or tokenizer than that of the canaries{_OTHER_ANSWER if encoded.has_pairs else ''}."
    )


def _counted(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"


def _named(record_ids: Sequence[str], is_chosen: Bool[np.ndarray, " n_records"]) -> str:
    chosen = [record_ids[i] for i in np.flatnonzero(is_chosen).tolist()]
    more = f" and {len(chosen) - _N_NAMED} more" if len(chosen) > _N_NAMED else ""
    return ", ".join(chosen[:_N_NAMED]) + more
