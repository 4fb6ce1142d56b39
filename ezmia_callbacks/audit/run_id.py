"""The name of a run, by which its files are known to belong together."""

from __future__ import annotations

import re
import secrets

from ezmia_callbacks.array_files import digest_of
from ezmia_callbacks.canaries.records import fingerprint
from ezmia_callbacks.errors import ReferenceMismatchError
from ezmia_callbacks.measuring.subset import CanarySubset
from ezmia_callbacks.scoring.statistics import TokenStatistics, arrays_of

__all__: list[str] = []

_RUN_ID = re.compile("[0-9a-f]{8}-[0-9a-f]{16}-[0-9a-f]{16}")


def new_run_id(subset: CanarySubset, reference: TokenStatistics) -> str:
    """A name for a run that begins: drawn at random, and with digests of what it is measured by.

    The operating system draws it, so that no generator of the training moves.

    Args:
        subset: The canaries.
        reference: Statistics of the reference, of all canaries.
    """
    return f"{secrets.token_hex(4)}-{_of_canaries(subset)}-{_of_reference(reference)}"


def check_run_id(run_id: str, subset: CanarySubset, reference: TokenStatistics) -> None:
    """See that canaries and reference are those of the run that has this name.

    Args:
        run_id: Its name; empty for a run of the first version, which had none.
        subset: The canaries.
        reference: Statistics of the reference, of all canaries.

    Raises:
        ReferenceMismatchError: if they are others.
    """
    if not run_id:
        return
    if not _RUN_ID.fullmatch(run_id):
        raise ReferenceMismatchError(f"{run_id!r:.80} is no name of a run: what was saved is damaged.")
    _, of_canaries, of_reference = run_id.split("-")
    if of_canaries != _of_canaries(subset):
        raise ReferenceMismatchError(
            f"The run {run_id} had other canaries, or the same records with other ids, groups, or another "
            "word on how membership was drawn: resume it with the canary set that it began with."
        )
    if of_reference != _of_reference(reference):
        raise ReferenceMismatchError(
            f"The reference is not that of the run {run_id}: resume in the folder of that run, or start "
            "again from the original weights, for the trained weights cannot stand in for the reference."
        )


def _of_canaries(subset: CanarySubset) -> str:
    return fingerprint([subset.all_encoded.fingerprint, subset.all_units.canaries.split_fingerprint])


def _of_reference(reference: TokenStatistics) -> str:
    return digest_of(arrays_of(reference))[:16]
