"""What a run's figures were made with, for whoever has to trust them later."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from typing import Literal

from ezmia_callbacks.results.command_line import without_values

__all__: list[str] = []

_PACKAGES = (
    "ezmia-callbacks",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "lightning",
    "pytorch-lightning",
    "datasets",
    "numpy",
    "scipy",
)
# As `str` writes one: what is read is written again letter by letter.
_DIGITS = "(0|[1-9][0-9]{0,17})"
_NUMBER = re.compile(_DIGITS)
_ALL_SCORED, _SOME_SCORED = re.compile(f"all {_DIGITS}"), re.compile(f"{_DIGITS} of {_DIGITS}")
_AFTER_THE_FACT = re.compile(f"after the fact, from {_DIGITS} saved models")

# Fields that are written as they are, by the names that files and readers know.
_TEXTS = {
    "run_id": "run",
    "started": "started",
    "python": "python",
    "machine": "machine",
    "command": "command",
    "canaries": "canaries",
    "reference": "reference",
    "score": "score",
    "power": "power of an audit",
    "model": "model",
    "parameters": "parameters",
    "base_model": "base model",
    "tokenizer": "canaries read with",
    "device": "device",
    "precision": "precision",
    "logits": "logits computed",
}


@dataclass(frozen=True)
class RunMetadata:
    """What the figures of a run were made with. A field that was not recorded is None, or empty.

    Attributes:
        run_id: Name of the run, drawn at its start: 8 random hexadecimal digits, then 16 each that stand for
            the canaries and for the reference. Its files carry it, so that those of two runs are never mixed.
        started: Start of the run, UTC, ISO 8601.
        python: Version of Python.
        machine: Operating system and processor architecture.
        command: The command line: its program and options, and of its values those that are known to be
            harmless, such as numbers.
        packages: Version of each package that matters, by its name.
        canaries: Fingerprint of the scored records: 16 hexadecimal digits.
        reference: What the model is compared with.
        score: Name of the score that decides.
        n_planned_audits: Audits that share the error rate; `"unknown"` if the run did not know.
        n_scored: Canaries that an audit scores.
        n_canaries: Canaries that could be scored.
        power: What one audit can find out about the budget, in one sentence.
        model: Name that the trained model was loaded by, or that of its class.
        parameters: How many it has, and how many of them are trained.
        n_checkpoints: Saved models that were audited after the run; None for audits during training.
        base_model: The model that those were compared with; several if their adapters name several.
        tokenizer: What made tokens of the canaries then; None where they were tokens already.
        device: Where they were computed.
        precision: In which precision.
        logits: How the logits are computed.
        others: Anything else that a file says, by its name there.
    """

    run_id: str | None = None
    started: str | None = None
    python: str | None = None
    machine: str | None = None
    command: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    canaries: str | None = None
    reference: str | None = None
    score: str | None = None
    n_planned_audits: int | Literal["unknown"] | None = None
    n_scored: int | None = None
    n_canaries: int | None = None
    power: str | None = None
    model: str | None = None
    parameters: str | None = None
    n_checkpoints: int | None = None
    base_model: str | None = None
    tokenizer: str | None = None
    device: str | None = None
    precision: str | None = None
    logits: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls) -> RunMetadata:
        """Time, machine, versions of the packages that matter, and the command, without its values."""
        return cls(
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            python=platform.python_version(),
            machine=f"{platform.system()} {platform.machine()}",
            command=without_values(sys.argv),
            packages=_versions(),
        )

    def to_dict(self) -> dict[str, str]:
        """What was recorded, as texts by the names that files and readers know.

        >>> RunMetadata(score="ez", n_scored=90, n_canaries=90).to_dict()
        {'score': 'ez', 'canaries in an audit': 'all 90'}
        """
        planned = {} if self.n_planned_audits is None else {"audits planned": str(self.n_planned_audits)}
        return {
            **self._texts("run_id", "started", "python", "machine", "command"),
            **self.packages,
            **self._texts("canaries", "reference", "score"),
            **planned,
            **self._scored(),
            **self._texts("power", "model", "parameters"),
            **self._audited(),
            **self._texts("base_model", "tokenizer", "device", "precision", "logits"),
            **self.others,
        }

    @classmethod
    def from_dict(cls, texts: Mapping[str, str]) -> RunMetadata:
        """The metadata that `to_dict` was called on.

        >>> RunMetadata.from_dict({"canaries in an audit": "45 of 90"}).n_scored
        45
        """
        left = dict(texts)
        known: dict[str, str | int] = {
            name: left.pop(label) for name, label in _TEXTS.items() if label in left
        }
        planned = left.get("audits planned", "")
        if planned == "unknown" or _NUMBER.fullmatch(planned):
            known["n_planned_audits"] = planned if planned == "unknown" else int(planned)
            del left["audits planned"]
        scored = left.get("canaries in an audit", "")
        if found := _ALL_SCORED.fullmatch(scored) or _SOME_SCORED.fullmatch(scored):
            known["n_scored"], known["n_canaries"] = int(found[1]), int(found.groups()[-1])
            del left["canaries in an audit"]
        if found := _AFTER_THE_FACT.fullmatch(left.get("audited", "")):
            known["n_checkpoints"] = int(found[1])
            del left["audited"]
        packages = {name: left.pop(name) for name in _PACKAGES if name in left}
        return cls(packages=packages, others=left, **known)  # type: ignore[arg-type]  # by field name

    def _texts(self, *names: str) -> dict[str, str]:
        values = {_TEXTS[name]: getattr(self, name) for name in names}
        return {label: value for label, value in values.items() if value is not None}

    def _scored(self) -> dict[str, str]:
        if self.n_scored is None:
            return {}
        is_all = self.n_scored == self.n_canaries
        return {
            "canaries in an audit": f"all {self.n_scored}"
            if is_all
            else f"{self.n_scored} of {self.n_canaries}"
        }

    def _audited(self) -> dict[str, str]:
        if self.n_checkpoints is None:
            return {}
        return {"audited": f"after the fact, from {self.n_checkpoints} saved models"}


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
