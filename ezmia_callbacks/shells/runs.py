"""The runs of one callback object: folds and sweeps hand the same one to one trainer after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ezmia_callbacks.audit.auditor import PrivacyAuditor
from ezmia_callbacks.results.history import AuditHistory

__all__: list[str] = []


@dataclass
class RunsOfOneCallback:
    """What is left of the runs before, and where each of them wrote.

    Attributes:
        earlier: Histories of the runs before the present one.
        n_in: Runs that have begun in each folder.
    """

    earlier: list[AuditHistory] = field(default_factory=list)
    n_in: dict[Path, int] = field(default_factory=dict)

    def begin(self, before: PrivacyAuditor | None, folder: Path, *, is_new: bool) -> None:
        """Another run begins.

        Args:
            before: The auditor of the last one; None if there was none.
            folder: Where it writes, unless another run of this callback did.
            is_new: Whether it starts, and does not go on with an interrupted one.
        """
        if before is not None and len(before.history):
            self.earlier.append(before.history)
        if is_new or folder not in self.n_in:
            self.n_in[folder] = self.n_in.get(folder, 0) + 1

    def folder(self, folder: Path) -> Path:
        """The present run's own folder: no run overwrites the files of another."""
        n = self.n_in.get(folder, 1)
        return folder if n == 1 else folder.with_name(f"{folder.name}_{n}")

    def histories(self, auditor: PrivacyAuditor | None) -> tuple[AuditHistory, ...]:
        """The audits of all runs, the present one's last."""
        present = () if auditor is None or not len(auditor.history) else (auditor.history,)
        return (*self.earlier, *present)
