"""The score of every record at every audit of a run: who leaks, since when, and whether anyone does.

A record that stands out may do so by chance: of many members without any leakage, a share of `fpr` ranks
above as many non-members. Lists of single records therefore say how many of them chance explains, and
whether the run leaks at all is for `leakage_at_any_audit` to say.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ezmia_callbacks.array_files import UNREADABLE, ArrayFile, load_arrays, save_arrays
from ezmia_callbacks.canaries.records import Record, record_key
from ezmia_callbacks.canaries.sets import CanarySet, by_group
from ezmia_callbacks.canaries.validity.near_duplicates import near_duplicates
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.functional.checkpoint_holder import sum_of_steps
from ezmia_callbacks.functional.intervals import DelongDifference, paired_delong_difference
from ezmia_callbacks.functional.permutation import PermutationTest, leakage_permutation_test
from ezmia_callbacks.functional.roc import auc
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.typed_rows import read_value

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

__all__: list[str] = []

# Of the file; another schema is refused, not guessed at. The first held a single score, the second no run.
_SCHEMA = 3
_ARRAYS = ("steps", "epochs", "is_baseline", "is_member")
_STEP_SCORES = "step_scores"
_NAMES = ("score_names", "record_ids", "fingerprint", "run_id")


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The scores that are judged, of each record at each audit that did not fail, in the order of the audits.

    Attributes:
        record_ids: Name of each record, or of each group.
        is_member: bool, (n_records,): True where the record is in the training set.
        fingerprint: Identifies the canaries; `load` asks for it again.
        steps: int64, (n_audits,): optimizer steps done.
        epochs: float64, (n_audits,): epochs done, NaN where unknown.
        is_baseline: bool, (n_audits,): True for audits before the first step.
        scores: float64, (n_audits, n_records) each, by the name of the score; higher means more likely a
            member.
        step_scores: float64, (n_audits, n_records): EZ of each audit against the one before it that did not
            fail, for `functional.checkpoint_holder_score`; 0.5 at the baseline, which has none before it.
        run_id: Name of the run; empty where it has none.

    Raises:
        ConfigurationError: if the arrays do not belong together, or there is no score.
    """

    record_ids: tuple[str, ...]
    is_member: Bool[np.ndarray, " n_records"]
    fingerprint: str
    steps: Int64[np.ndarray, " n_audits"]
    epochs: Float64[np.ndarray, " n_audits"]
    is_baseline: Bool[np.ndarray, " n_audits"]
    scores: Mapping[str, Float64[np.ndarray, "n_audits n_records"]]
    step_scores: Float64[np.ndarray, "n_audits n_records"]
    run_id: str = ""

    def __post_init__(self) -> None:
        """Check that the arrays belong together."""
        n_audits, n_records = len(self.steps), len(self.record_ids)
        shapes = {name: getattr(self, name).shape for name in _ARRAYS}
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(("steps", "epochs", "is_baseline"), (n_audits,))
        shapes[_STEP_SCORES] = self.step_scores.shape
        expected |= {"is_member": (n_records,), _STEP_SCORES: (n_audits, n_records)}
        shapes |= {f"scores of {name}": scores.shape for name, scores in self.scores.items()}
        expected |= {f"scores of {name}": (n_audits, n_records) for name in self.scores or ("a score",)}
        if shapes != expected:
            raise ConfigurationError(f"The arrays have the shapes {shapes}, but they need {expected}.")
        is_number = not any(np.isnan(scores).any() for scores in self.scores.values())
        if not is_number or np.isinf(self.epochs).any() or np.any(np.diff(self.steps) < 0):
            raise ConfigurationError("Scores and epochs must be numbers, and steps must not fall.")

    def __repr__(self) -> str:
        sizes = f"{self.n_members} members and {self.n_non_members} non-members"
        return f"Trajectories({self.n_audits} audits of {sizes}, scores {', '.join(self.scores)})"

    @classmethod
    def empty(
        cls,
        *,
        score_names: Sequence[str],
        record_ids: Sequence[str],
        is_member: Bool[np.ndarray, " n_records"],
        fingerprint: str,
    ) -> Trajectories:
        """The trajectories of a run that has no audits yet."""
        return cls(
            record_ids=tuple(record_ids),
            is_member=np.asarray(is_member, dtype=np.bool_),
            fingerprint=fingerprint,
            steps=np.zeros(0, dtype=np.int64),
            epochs=np.zeros(0),
            is_baseline=np.zeros(0, dtype=np.bool_),
            scores={name: np.zeros((0, len(record_ids))) for name in score_names},
            step_scores=np.zeros((0, len(record_ids))),
        )

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores."""
        return tuple(self.scores)

    @property
    def n_audits(self) -> int:
        """Number of audits."""
        return len(self.steps)

    @property
    def n_members(self) -> int:
        """Number of member records."""
        return int(self.is_member.sum())

    @property
    def n_non_members(self) -> int:
        """Number of non-member records."""
        return len(self.record_ids) - self.n_members

    def with_result(self, result: AuditResult) -> Trajectories:
        """The trajectories with one audit more; as they are if it failed.

        Raises:
            ConfigurationError: if the audit has no scores in memory, or not those of these records.
        """
        if result.status == "failed":
            return self
        added, step_scores = result.judged_scores, result.step_scores
        shapes = {name: scores.shape for name, scores in added.items()}
        expected = dict.fromkeys(self.scores, (len(self.record_ids),))
        if step_scores is None or shapes != expected or step_scores.shape != (len(self.record_ids),):
            raise ConfigurationError(
                f"The audit at step {result.step} has scores of the shapes {shapes}, but those of "
                f"{', '.join(self.scores)} of {len(self.record_ids)} records are needed, and their step "
                "scores: add audits as they are made, not ones that were loaded from a file."
            )
        epoch = np.nan if result.epoch is None else result.epoch
        return replace(
            self,
            steps=np.append(self.steps, np.int64(result.step)),
            epochs=np.append(self.epochs, epoch),
            is_baseline=np.append(self.is_baseline, result.is_baseline),
            scores={
                name: np.concatenate([scores, added[name][np.newaxis]])
                for name, scores in self.scores.items()
            },
            step_scores=np.concatenate([self.step_scores, step_scores[np.newaxis]]),
        )

    def up_to_step(self, step: int) -> Trajectories:
        """The trajectories as they were at an optimizer step; for a run that resumes there."""
        return self.audits(self.steps <= step)

    def of_records(self, chosen: Bool[np.ndarray, " n_records"]) -> Trajectories:
        """The trajectories of some records, such as those of one tier: tiers are never pooled."""
        return replace(
            self,
            scores={name: scores[:, chosen] for name, scores in self.scores.items()},
            step_scores=self.step_scores[:, chosen],
            is_member=self.is_member[chosen],
            record_ids=tuple(
                name for name, is_chosen in zip(self.record_ids, chosen, strict=True) if is_chosen
            ),
        )

    def by_group(self, groups: Sequence[str]) -> Trajectories:
        """The mean scores of groups of records, so that what follows tells of groups.

        Args:
            groups: Name of each record's group, (n_records,).
        """
        by_score = {name: by_group(each, groups, self.is_member) for name, each in self.scores.items()}
        grouped = next(iter(by_score.values()))
        return replace(
            self,
            scores={name: each.scores for name, each in by_score.items()},
            step_scores=by_group(self.step_scores, groups, self.is_member).scores,
            is_member=grouped.is_member,
            record_ids=grouped.group_ids,
        )

    def of_score(self, score: str | None = None) -> Float64[np.ndarray, "n_audits n_records"]:
        """One score of each record at each audit.

        Args:
            score: Its name; None where there is a single one.

        Raises:
            ConfigurationError: if there is no such score, or several and none was named.
        """
        if score is None and len(self.scores) == 1:
            return next(iter(self.scores.values()))
        if score is None or score not in self.scores:
            got = "`score` is needed" if score is None else f"There is no score {score!r}"
            raise ConfigurationError(f"{got}: the run has those of {', '.join(self.scores)}.")
        return self.scores[score]

    def trained(self) -> Trajectories:
        """The audits after the first step."""
        return self.audits(~self.is_baseline)

    @cached_property
    def sum_of_steps(self) -> Float64[np.ndarray, " n_records"]:
        """What the step scores of these audits add to `functional.checkpoint_holder_score`."""
        return sum_of_steps(self.trained().step_scores)

    def audits(self, chosen: Bool[np.ndarray, " n_audits"] | slice) -> Trajectories:
        """The trajectories at some of the audits."""
        return replace(
            self,
            steps=self.steps[chosen],
            epochs=self.epochs[chosen],
            is_baseline=self.is_baseline[chosen],
            scores={name: scores[chosen] for name, scores in self.scores.items()},
            step_scores=self.step_scores[chosen],
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; it holds ids and scores, no text."""
        path = Path(path)
        for stale in reversed(files_after(path, 1)):
            stale.unlink()
        self.write(path)

    def write(self, path: Path) -> None:
        """Write one file, and leave those of further blocks beside it alone."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {_array_of(score): scores for score, scores in self.scores.items()}
        arrays[_STEP_SCORES] = self.step_scores
        names = {name: getattr(self, name) for name in _NAMES}
        save_arrays(path, arrays, {"schema": _SCHEMA, **names}, digested=_NAMES)

    @classmethod
    def load(
        cls, path: str | Path, *, fingerprint: str | None = None, run_id: str | None = None
    ) -> Trajectories:
        """The trajectories that `save` wrote, or a run.

        A run of many audits writes several files, of which the first one is named; the others stand beside
        it and are read with it.

        Args:
            path: The file, or the first one.
            fingerprint: Of the canaries that they must belong to; None takes any.
            run_id: Name of the run that they must belong to; None takes any.

        Raises:
            ConfigurationError: if the file is missing, damaged, of another schema, or of other canaries or
                another run.
        """
        path = Path(path)
        blocks = [_load_block(path)]
        blocks += map(_load_block, files_after(path, 1))
        try:
            found = joined(blocks)
        except ConfigurationError as error:
            raise ConfigurationError(f"The files beside {path} are not of one run: {error}") from error
        if fingerprint is not None and found.fingerprint != fingerprint:
            raise ConfigurationError(
                f"The trajectories in {path} belong to other canaries (fingerprint "
                f"{found.fingerprint:.40}, these have {fingerprint}): use the folder of the run that they "
                "were drawn for."
            )
        if run_id is not None and found.run_id != run_id:
            raise ConfigurationError(
                f"The trajectories in {path} belong to the run {found.run_id or 'without a name'!r:.60}, not "
                f"to {run_id or 'one without a name'!r}: give each run a folder of its own."
            )
        return found


def joined(blocks: Sequence[Trajectories]) -> Trajectories:
    """The trajectories of one run from those of its blocks.

    Raises:
        ConfigurationError: if they are of several runs.
    """
    first = blocks[0]
    if len(blocks) == 1:
        return first
    for block in blocks:
        if any(getattr(block, name) != getattr(first, name) for name in _NAMES):
            raise ConfigurationError("They have other records, scores or canaries.")
        if not np.array_equal(block.is_member, first.is_member):
            raise ConfigurationError("They have other members.")
    return replace(
        first,
        steps=np.concatenate([block.steps for block in blocks]),
        epochs=np.concatenate([block.epochs for block in blocks]),
        is_baseline=np.concatenate([block.is_baseline for block in blocks]),
        scores={name: np.concatenate([block.scores[name] for block in blocks]) for name in first.scores},
        step_scores=np.concatenate([block.step_scores for block in blocks]),
    )


def file_of_block(path: Path, number: int) -> Path:
    """The file of a block of a run: the first one has the name itself."""
    return path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def files_after(path: Path, first: int) -> list[Path]:
    """The files of blocks from a number on that are there, one after the other."""
    numbered = (file_of_block(path, number) for number in itertools.count(first))
    return list(itertools.takewhile(Path.is_file, numbered))


def _load_block(path: Path) -> Trajectories:
    try:
        file = load_arrays(
            path,
            _ARRAYS,
            # The first schema had none of these: that is told by its number.
            more=lambda known: (
                [_array_of(score) for score in known.get("score_names", ())]
                + [_STEP_SCORES] * (known["schema"] == _SCHEMA)
            ),
        )
        if file.metadata["schema"] != _SCHEMA:
            raise ValueError(f"its schema is not {_SCHEMA}, the only one that this release reads")
        found = read_value(Trajectories, _row(file))
        if not file.is_intact(digested=_NAMES):
            raise ValueError("it is damaged")
    except UNREADABLE as error:
        raise ConfigurationError(f"{path} is not a file of audit trajectories: {error}.") from error
    return found


def _row(file: ArrayFile) -> dict[str, object]:
    """The fields of trajectories, as a file has them."""
    row = {name: file.arrays[name] for name in _ARRAYS}
    row |= {name: file.metadata[name] for name in _NAMES if name != "score_names"}
    names = read_value(tuple[str, ...], file.metadata["score_names"], name="score_names")
    if len(set(names)) < len(names):
        raise ConfigurationError("it names a score more than once")
    scores = {name: file.arrays[_array_of(name)] for name in names}
    return {**row, "scores": scores, "step_scores": file.arrays[_STEP_SCORES]}


def _array_of(score: str) -> str:
    """Name of a score's array in the file."""
    return f"scores of {score}"


@dataclass(frozen=True)
class ExposedRecord:
    """A member whose score stands above those of nearly all non-members.

    Attributes:
        record_id: Its name.
        score: Its score at the last audit.
        share_above: Share of the non-members that score as high or higher there, in [0, `fpr`].
        first_step: Steps done at the audit from which on it stood above the threshold and stayed.
        first_epoch: Epochs done there; None if unknown.
        n_audits_above: Audits in a row at which it did, up to the last: how early it was.
    """

    record_id: str
    score: float
    share_above: float
    first_step: int
    first_epoch: float | None
    n_audits_above: int


@dataclass(frozen=True)
class ExposedRecords:
    """The members that an attack would pick out first, and how many of them chance explains.

    Attributes:
        records: At most as many as asked for, the most exposed first.
        n_exposed: Members above the threshold at the last audit, listed or not.
        n_expected: As many would be, on average, if the model had leaked nothing at all.
        n_members: Members among which they were looked for.
        n_non_members: Non-members that set the threshold.
        fpr: Largest share of non-members that may stand above the threshold.
        score: Name of the score that they were found by.
        step: Steps done at the last audit.
    """

    records: tuple[ExposedRecord, ...]
    n_exposed: int
    n_expected: float
    n_members: int
    n_non_members: int
    fpr: float
    score: str
    step: int

    def describe(self) -> str:
        """Say in one sentence how many there are, and how many chance explains."""
        return (
            f"At step {self.step}, {self.n_exposed} of {self.n_members} members score above all but "
            f"a fraction {self.fpr:.3g} of {self.n_non_members} non-members; without any leakage about "
            f"{self.n_expected:.1f} would."
        )


def most_exposed(
    trajectories: Trajectories, *, n: int = 20, fpr: float = 0.1, score: str | None = None
) -> ExposedRecords:
    """The members that the last audit tells from non-members best, and since when it does.

    A member is exposed if at most a share of `fpr` of the non-members score as high or higher: a tie counts
    against the attacker. Their number is `n_members` times the true-positive rate at that `fpr`. They are
    ranked by that share, equal ones by how early they stood out for good, then by score.

    Many records are tested at once, so some are exposed by chance: about `fpr * n_members` if nothing leaks
    at all, `n_expected` of the result exactly. Compare it with `n_exposed` before any record is named.

    Args:
        trajectories: Scores of the run; its last audit counts as now.
        n: Largest number of records to list, >= 1.
        fpr: Largest share of non-members above the threshold, in (0, 1).
        score: Name of the score that they are found by; None takes the one with the largest AUC at the last
            audit, where chance has a little more room than `n_expected` says.

    Raises:
        ConfigurationError: if there is no audit after the first step, or no such score, or an argument is
            outside its range.
        TooFewCanariesError: if there are fewer than `1 / fpr` non-members.
    """
    trained = _trained(trajectories)
    if n < 1 or not 0 < fpr < 1:
        raise ConfigurationError(f"Got n={n} and fpr={fpr}: n must be at least 1 and fpr in (0, 1).")
    n_non_members = trained.n_non_members
    if n_non_members * fpr < 1:
        raise TooFewCanariesError(
            f"FPR {fpr:g} needs {int(np.ceil(1 / fpr))} non-members to be resolved, got {n_non_members}: add "
            "canaries or raise `fpr`."
        )
    if score is None:
        score = max(trained.scores, key=lambda name: auc(trained.scores[name][-1], trained.is_member))
    of_score = trained.of_score(score)
    members = np.flatnonzero(trained.is_member)
    shares = np.stack([_shares_above(row, trained.is_member) for row in of_score])
    is_above = shares <= fpr
    # Audits since the last one that found the member below the threshold.
    n_above = np.where(is_above.all(axis=0), trained.n_audits, np.argmin(is_above[::-1], axis=0))
    scores = of_score[-1][members]
    exposed = np.flatnonzero(is_above[-1])
    order = exposed[np.lexsort((-scores[exposed], -n_above[exposed], shares[-1][exposed]))]

    def record(i: int) -> ExposedRecord:
        first = trained.n_audits - int(n_above[i])
        epoch = float(trained.epochs[first])
        return ExposedRecord(
            record_id=trained.record_ids[members[i]],
            score=float(scores[i]),
            share_above=float(shares[-1][i]),
            first_step=int(trained.steps[first]),
            first_epoch=None if np.isnan(epoch) else epoch,
            n_audits_above=int(n_above[i]),
        )

    # A member ranks uniformly among itself and the non-members if nothing leaks.
    n_allowed = np.count_nonzero(np.arange(1, n_non_members + 1) / n_non_members <= fpr)
    return ExposedRecords(
        records=tuple(record(i) for i in order[:n].tolist()),
        n_exposed=len(exposed),
        n_expected=len(members) * (n_allowed + 1) / (n_non_members + 1),
        n_members=len(members),
        n_non_members=n_non_members,
        fpr=fpr,
        score=score,
        step=int(trained.steps[-1]),
    )


def export_exposed(
    path: str | Path, exposed: ExposedRecords, *, texts: Mapping[str, str] | None = None
) -> None:
    """Write the exposed records, the most exposed first, as CSV or JSON by the suffix of the path.

    The file names members by their ids alone, and holds their text only where it is passed. JSON also says
    how many records chance explains.

    Args:
        path: A file that ends in `.csv` or `.json`.
        exposed: What `most_exposed` returned.
        texts: Text by record id, for records whose text the file may hold.

    Raises:
        ConfigurationError: if the path has another suffix.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = [asdict(record) for record in exposed.records]
    if texts is not None:
        rows = [{**row, "text": texts.get(row["record_id"])} for row in rows]
    if path.suffix == ".json":
        content = {**asdict(exposed), "records": rows}
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    elif path.suffix == ".csv":
        columns = [*ExposedRecord.__dataclass_fields__, *(["text"] if texts is not None else [])]
        file = io.StringIO()
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, file.getvalue())
    else:
        raise ConfigurationError(f"Cannot write to {path.name}: the file name must end in .csv or .json.")


@dataclass(frozen=True)
class NearCopy:
    """A training row that nearly says what an exposed member says.

    Attributes:
        record_id: The exposed member.
        row: Index of the training row, other than the member's own.
        containment: Share of the shorter one's word triples that the longer one has too, in [0.8, 1].
    """

    record_id: str
    row: int
    containment: float


@dataclass(frozen=True)
class DropList:
    """What to leave out of the next training.

    Attributes:
        record_ids: The exposed members, the most exposed first.
        near_copies: Training rows to be left out with them, or kept once: copies of a record make it leak
            more, and one that stays undoes its removal. Empty if no training rows were searched.
    """

    record_ids: tuple[str, ...]
    near_copies: tuple[NearCopy, ...] = ()


def drop_list(
    exposed: ExposedRecords,
    *,
    canaries: CanarySet | None = None,
    training_records: Iterable[Record] | None = None,
) -> DropList:
    """The exposed members, and the training rows that nearly repeat them.

    Other records may stand out once these are gone: audit the next training, too.

    Args:
        exposed: What `most_exposed` returned.
        canaries: The canaries that it tells of; with `training_records`.
        training_records: The rows that were trained on, in the shape of the canaries; read once.

    Raises:
        ConfigurationError: if only one of the two is passed, or the canaries are others.
        MissingDependencyError: if rows are searched and datasketch is not installed.
    """
    record_ids = tuple(record.record_id for record in exposed.records)
    if canaries is None and training_records is None:
        return DropList(record_ids)
    if canaries is None or training_records is None:
        raise ConfigurationError(
            "Searching for near copies needs both `canaries` and `training_records`: pass the other one, too."
        )
    record_of = dict(zip(canaries.record_ids, canaries.records, strict=True))
    missing = [name for name in record_ids if name not in record_of]
    if missing:
        raise ConfigurationError(
            f"{len(missing)} of {len(record_ids)} exposed records are not among the canaries: pass those of "
            "the run, and records rather than groups."
        )
    rows = list(training_records)
    pairs = near_duplicates([record_of[name] for name in record_ids], rows)
    copies = []
    own_keys = {record_key(record_of[name]): name for name in record_ids}
    for pair in pairs:
        name = record_ids[pair.record]
        # The first row that says the same is the member's own.
        if own_keys.get(record_key(rows[pair.other])) == name:
            del own_keys[record_key(rows[pair.other])]
            continue
        copies.append(NearCopy(name, pair.other, pair.containment))
    return DropList(record_ids, tuple(copies))


def leakage_at_any_audit(
    trajectories: Trajectories, *, n_permutations: int = 9999, seed: int = 0
) -> PermutationTest:
    """Test of "no leakage at any audit after the first step", over all of them and all scores at once.

    A small p-value refutes that. It says nothing about a budget, and nothing about single records.

    Args:
        trajectories: Scores of the run; of groups where canaries belong to groups, see
            `Trajectories.by_group`. Membership must have been drawn at random, not by coins within pairs.
        n_permutations: Number of random permutations, >= 1.
        seed: Seed of the permutations.

    Returns:
        The test; its `audit` counts the audits of `trajectories`.

    Raises:
        ConfigurationError: if there is no audit after the first step, or `n_permutations` is below 1.
        TooFewCanariesError: if either class is empty.

    Source: see `leakage_permutation_test`.
    """
    trained = _trained(trajectories)
    test = leakage_permutation_test(
        np.concatenate(list(trained.scores.values())),
        trained.is_member,
        n_permutations=n_permutations,
        seed=seed,
    )
    audit = test.audit % trained.n_audits
    return replace(test, audit=int(np.flatnonzero(~trajectories.is_baseline)[audit]))


def rise_between(
    trajectories: Trajectories,
    earlier_step: int,
    later_step: int,
    *,
    confidence: float = 0.95,
    score: str | None = None,
) -> DelongDifference:
    """Rise of the AUC between two audits: it leaked more if the lower end of the interval is above 0.

    Narrower than a comparison of two intervals, because both audits score the same records. Choose the two
    audits beforehand, such as the ends of two epochs: of those that look farthest apart it claims too much.

    Args:
        trajectories: Scores of the run; of groups where canaries belong to groups.
        earlier_step: Steps done at the earlier audit.
        later_step: Steps done at the later audit.
        confidence: Coverage, in (0, 1).
        score: Name of the score; needed where several are judged. Choose it beforehand as well.

    Raises:
        ConfigurationError: if there is no audit at one of the steps, or no such score, or `confidence` is
            outside (0, 1).
        TooFewCanariesError: if either class has fewer than 2 records.

    Source: DeLong et al. 1988, see `paired_delong_difference`.
    """
    return paired_delong_difference(
        _scores_at(trajectories, later_step, score),
        _scores_at(trajectories, earlier_step, score),
        trajectories.is_member,
        confidence=confidence,
    )


def _scores_at(trajectories: Trajectories, step: int, score: str | None) -> Float64[np.ndarray, " n_records"]:
    found = np.flatnonzero(trajectories.steps == step)
    if len(found) == 0:
        raise ConfigurationError(
            f"There is no audit at step {step}; there are audits at {trajectories.steps.tolist()}."
        )
    scores: Float64[np.ndarray, " n_records"] = trajectories.of_score(score)[found[-1]]
    return scores


def _trained(trajectories: Trajectories) -> Trajectories:
    trained = trajectories.trained()
    if trained.n_audits == 0:
        raise ConfigurationError(
            "There are no audits after the first step yet: audit the model during training."
        )
    return trained


def _shares_above(
    scores: Float64[np.ndarray, " n_records"], is_member: Bool[np.ndarray, " n_records"]
) -> Float64[np.ndarray, " n_members"]:
    """Share of the non-members that score as high as each member, or higher."""
    non_members = np.sort(scores[~is_member])
    n_above = len(non_members) - np.searchsorted(non_members, scores[is_member], side="left")
    shares: Float64[np.ndarray, " n_members"] = n_above / len(non_members)
    return shares
