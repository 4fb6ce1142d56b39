"""The trajectories of a run that goes on, in blocks of audits: one more costs the same after any number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ezmia_callbacks.functional.checkpoint_holder import EarlierSteps
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.results.trajectories import Trajectories, file_of_block, files_after, joined

if TYPE_CHECKING:
    from jaxtyping import Bool

__all__: list[str] = []

N_AUDITS_OF_BLOCK = 64


@dataclass(frozen=True, eq=False)
class TrajectoryBlocks:
    """The scores of all records at all audits; only the last block is ever copied, or written again.

    Attributes:
        blocks: At least one, in the order of the audits; all but the last one are full.
    """

    blocks: tuple[Trajectories, ...]

    @classmethod
    def of(cls, trajectories: Trajectories) -> TrajectoryBlocks:
        """These trajectories in blocks."""
        starts = range(0, max(1, trajectories.n_audits), N_AUDITS_OF_BLOCK)
        return cls(tuple(trajectories.audits(slice(i, i + N_AUDITS_OF_BLOCK)) for i in starts))

    @cached_property
    def whole(self) -> Trajectories:
        """All of them together."""
        return joined(self.blocks)

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores."""
        return self.blocks[0].score_names

    @property
    def earlier_steps(self) -> EarlierSteps:
        """The step scores of the audits after the first step, as the next audit needs them."""
        full = [block for block in self.blocks if _is_full(block)]
        last = self.blocks[-1]
        return EarlierSteps(
            steps=last.audits(slice(0, 0) if _is_full(last) else ~last.is_baseline).step_scores,
            n_summed=sum(int((~block.is_baseline).sum()) for block in full),
            sums=tuple(block.sum_of_steps for block in full),
        )

    def with_result(self, result: AuditResult) -> TrajectoryBlocks:
        """The trajectories with one audit more; as they are if it failed.

        Raises:
            ConfigurationError: if the audit has no scores in memory, or not those of these records.
        """
        if result.status == "failed":
            return self
        last = self.blocks[-1]
        if _is_full(last):
            return TrajectoryBlocks((*self.blocks, last.audits(slice(0, 0)).with_result(result)))
        return TrajectoryBlocks((*self.blocks[:-1], last.with_result(result)))

    def of_records(self, chosen: Bool[np.ndarray, " n_records"]) -> TrajectoryBlocks:
        """The trajectories of some records."""
        return TrajectoryBlocks(tuple(block.of_records(chosen) for block in self.blocks))

    def save(self, path: Path, *, after: TrajectoryBlocks | None = None) -> None:
        """Write a file for each block, each whole or not at all; `Trajectories.load` reads them all.

        Args:
            path: File of the first block.
            after: What the files hold, as this process has saved it: blocks that are the same stay.
        """
        # From the end, so that a killed process leaves the audits of one run, from its start.
        for stale in reversed(files_after(path, len(self.blocks))):
            stale.unlink()
        saved = () if after is None else after.blocks
        for number, block in enumerate(self.blocks):
            file = file_of_block(path, number)
            if not (number < len(saved) and saved[number] is block and file.is_file()):
                block.write(file)


def _is_full(block: Trajectories) -> bool:
    return block.n_audits >= N_AUDITS_OF_BLOCK
