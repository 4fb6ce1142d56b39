"""What a checkpoint of the trainer needs to go on, kept in the audit's own folder.

The trainer's state is pushed to the hub with the model. It names the part of the run alone; which records
were fed, and what the audits found, is in notes here, one for each checkpoint.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezmia_callbacks.files import remove_leftovers, write_atomically
from ezmia_callbacks.safe_text import get_logger
from ezmia_callbacks.typed_rows import parse_json, read_mapping, read_value

__all__: list[str] = []

logger = get_logger(__name__)

_STEP = re.compile("[0-9]+")
_NAMES = ("run_id", "history", "exposures", "judged_by")


@dataclass(frozen=True)
class CheckpointNotes:
    """The notes of one part of a run: from its start, or from where it was resumed, to its end.

    Attributes:
        folder: Where the notes of all parts are.
        part: Name of the part. Parts that went on from one checkpoint never take each other's notes.
    """

    folder: Path
    part: str

    @classmethod
    def anew(cls, folder: Path) -> CheckpointNotes:
        """Those of a part that begins now; its name is drawn at random, by the operating system."""
        return cls(folder, secrets.token_hex(4))

    def write(self, step: int, note: Mapping[str, Any], *, checkpoints: Collection[int]) -> None:
        """Write the note of a checkpoint, and remove those that no checkpoint needs any more.

        Args:
            step: Optimizer steps of the checkpoint.
            note: What it needs, as JSON holds it.
            checkpoints: Steps of the checkpoints that there are.
        """
        try:
            write_atomically(_file(self.folder, step, self.part), json.dumps(note, allow_nan=False) + "\n")
            self._prune({*checkpoints, step})
        except OSError as error:
            logger.warning("What the checkpoint of step %d needs to go on was not written: %s", step, error)

    def read(self, step: int) -> Mapping[str, Any] | None:
        """The newest note that is not of later than a step; None, with a warning, if it is lost.

        Args:
            step: Optimizer steps of the checkpoint.
        """
        steps = [found for found, part in self._found() if part == self.part and found <= step]
        if not steps:
            logger.warning(
                "What the checkpoint of step %d was fed is lost: no note in %s.", step, self.folder
            )
            return None
        path = _file(self.folder, max(steps), self.part)
        try:
            note = read_mapping(parse_json(path.read_text(encoding="utf-8")))
            return {name: note[name] for name in _NAMES}
        except (OSError, ValueError, KeyError) as error:
            logger.warning("What the checkpoint of step %d was fed is lost (%s): %s", step, path, error)
            return None

    def _found(self) -> list[tuple[int, str]]:
        names = [path.stem.split("-") for path in self.folder.glob("*-*.json")]
        return [(int(name[0]), name[1]) for name in names if len(name) == 2 and _STEP.fullmatch(name[0])]

    def _prune(self, checkpoints: Collection[int]) -> None:
        found = self._found()
        # Another callback's checkpoint goes on from the note before it, if it was killed before its own.
        needed = {
            (max(mine), part)
            for part in {part for _, part in found}
            for step in checkpoints
            if (mine := [known for known, of_part in found if of_part == part and known <= step])
        }
        for step, part in set(found) - needed:
            _file(self.folder, step, part).unlink(missing_ok=True)
        remove_leftovers(self.folder)


@dataclass(frozen=True)
class KeptInState:
    """What the trainer's state, which is pushed with the model, keeps of a run.

    Attributes:
        part: Name of the part of the run.
        run: The random digits of the run's name, which say nothing of its canaries; empty if it had none.
    """

    part: str
    run: str = ""

    @classmethod
    def of(cls, part: str, run_id: str | None) -> KeptInState:
        """That of a part of a run of this name."""
        return cls(part, (run_id or "").partition("-")[0])

    def is_of(self, run_id: str | None) -> bool:
        """Whether a run of this name may be meant."""
        return not self.run or self.run == (run_id or "").partition("-")[0]


def kept_in_state(kept: object) -> KeptInState | None:
    """What the trainer's state keeps of the run that a checkpoint belongs to; None if that is nothing.

    Args:
        kept: What the state has under the callback's name.

    Raises:
        ConfigurationError: if it is not what the callback has put there.
    """
    name = "the callback's entry in trainer_state.json"
    row = read_mapping(kept, name)
    return read_value(KeptInState, row, newer={"run"}, name=name) if row else None


def _file(folder: Path, step: int, part: str) -> Path:
    return folder / f"{step}-{part}.json"
