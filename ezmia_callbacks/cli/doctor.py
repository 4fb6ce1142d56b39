"""`ezmia doctor`: whether an audit would work here."""

import logging
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from ezmia_callbacks.cli.terminal import ExitCode, JsonOption, quiet_libraries, say, say_json, say_table
from ezmia_callbacks.files import check_writable
from ezmia_callbacks.safe_text import get_logger

__all__: list[str] = []

_DISTRIBUTION = "ezmia-callbacks"

_NEEDED_FOR = {
    "torch": "everything",
    "numpy": "everything",
    "scipy": "everything",
    "datasketch": "everything",
    "scikit-learn": "everything",
    "safetensors": "everything",
    "tqdm": "everything",
    "filelock": "everything",
    "transformers": "Hugging Face callback, ezmia audit",
    "accelerate": "Hugging Face callback",
    "peft": "LoRA and other adapters",
    "trl": "SFTTrainer; DPOTrainer from 0.29",
    "lightning": "Lightning callback",
    "pytorch-lightning": "Lightning callback, under its other name",
    "matplotlib": "plots",
    "typer": "this command",
    "rich": "this command",
    "jinja2": "reports as a web page",
    "pyarrow": "Parquet files",
}
"""What each package is for, in the order in which they are shown."""

# Oldest supported releases of what no extra installs; pyproject.toml has all others.
_MINIMUM_OF_OTHERS = {"trl": "0.17", "pytorch-lightning": "2.4"}
_NO_MINIMUM = "0"

Outcome = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What.
        outcome: `"missing"` for an optional package that is not installed, `"problem"` for what needs
            fixing.
        found: What was found there.
        advice: What it is needed for, or what to do.
    """

    name: str
    outcome: Outcome
    found: str
    advice: str = ""


class Requirement(NamedTuple):
    """A package that this one asks for.

    Attributes:
        name: Its name.
        minimum: Its oldest supported release; 0 where none is too old.
        extra: The extra that installs it; None if it is always installed.
    """

    name: str
    minimum: str
    extra: str | None


def doctor(
    folder: Annotated[Path, typer.Option("--folder", help="Folder that runs will be written to.")] = Path(),
    is_json: JsonOption = False,
) -> None:
    """Check that an audit works here: packages and their versions, GPU, a writable folder, a tiny real audit.

    Exit codes: 0 everything works; 3 something needs fixing.
    """
    with quiet_libraries():
        checks = [
            Check("Python", "ok", platform.python_version()),
            *_packages(),
            _checked("accelerator", _accelerator),
            _checked("folder", lambda: _writable(folder)),
            _checked("self-test", _silent_self_test),
        ]
    problems = [check for check in checks if check.outcome == "problem"]
    if is_json:
        say_json({"is_well": not problems, "checks": [asdict(check) for check in checks]})
    else:
        say_table(
            ("", "", "found", ""),
            [
                ({"ok": "ok", "missing": "-", "problem": "PROBLEM"}[c.outcome], c.name, c.found, c.advice)
                for c in checks
            ],
        )
        say()
        names = ", ".join(check.name for check in problems)
        say(f"Problems found: {names}." if problems else "Everything works.", style="bold")
    raise typer.Exit(ExitCode.FAILED if problems else ExitCode.OK)


def requirement_of(line: str) -> Requirement:
    """The requirement that a line of a distribution's metadata states.

    >>> requirement_of("transformers>=4.46; extra == 'huggingface'")
    Requirement(name='transformers', minimum='4.46', extra='huggingface')
    """
    asked, _, marker = line.partition(";")
    name = re.match(r"\s*([\w.-]+)", asked)
    minimum = re.search(r">=\s*([\w.]+)", asked)
    extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
    return Requirement(
        name.group(1) if name else asked.strip(),
        minimum.group(1) if minimum else _NO_MINIMUM,
        extra.group(1) if extra else None,
    )


def requirements() -> dict[str, Requirement]:
    """What the installed package asks for, with its extras but for `all` and `dev`, by name.

    Raises:
        PackageNotFoundError: if it is not installed, but imported from its source.
    """
    asked = map(requirement_of, metadata.requires(_DISTRIBUTION) or ())
    return {one.name: one for one in asked if one.extra not in ("all", "dev")}


def _packages() -> list[Check]:
    try:
        known = requirements()
    except metadata.PackageNotFoundError:
        here = Check(_DISTRIBUTION, "missing", "not installed", "versions are not checked: pip install .")
        return [here, *(_package(name, None) for name in _NEEDED_FOR)]
    return [_package(name, known.get(name)) for name in _NEEDED_FOR]


def _package(name: str, requirement: Requirement | None) -> Check:
    minimum = requirement.minimum if requirement else _MINIMUM_OF_OTHERS.get(name, _NO_MINIMUM)
    purpose = _NEEDED_FOR[name]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if requirement and requirement.extra is None:
            return Check(name, "problem", "not installed", f"pip install '{name}>={minimum}'")
        how = f'pip install "{_DISTRIBUTION}[{requirement.extra}]"' if requirement else f"pip install {name}"
        return Check(name, "missing", "not installed", f"{purpose}: {how}")
    if _release(version) < _release(minimum):
        return Check(name, "problem", version, f"{minimum} or newer is needed: pip install -U {name}")
    return Check(name, "ok", version, purpose)


def _release(version: str) -> tuple[int, ...]:
    """Its leading numbers: 2.4.0+cpu is (2, 4)."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found.group().split(".")] if found else [0]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _checked(name: str, check: Callable[[], Check]) -> Check:
    """What the check says, or why it broke down: a broken driver raises errors of every kind."""
    try:
        return check()
    except Exception as error:  # whatever it is, it is what the user came to learn
        reason = " ".join(str(error).split()) or "no reason given"
        return Check(name, "problem", type(error).__name__, reason)


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        return Check("accelerator", "ok", found)
    if torch.backends.mps.is_available():
        return Check("accelerator", "ok", "Apple GPU (mps)")
    return Check("accelerator", "missing", "none", "audits run on the CPU, slowly for large models")


def _writable(folder: Path) -> Check:
    check_writable(folder)
    return Check("folder", "ok", str(folder.resolve()), "writable")


def _silent_self_test() -> Check:
    """The same without the lines of its audits: standard output is the table's, or JSON's."""
    package = get_logger("ezmia_callbacks")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        return _self_test()
    finally:
        package.setLevel(level)


def _self_test() -> Check:
    """Train a tiny model until it has memorized its members, and see that the audit notices."""
    import numpy as np
    import torch
    from torch import nn

    from ezmia_callbacks.audit.auditor import PrivacyAuditor
    from ezmia_callbacks.canaries import hold_out_canaries

    started = time.perf_counter()
    n_tokens, length = 32, 40
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": row.tolist()} for row in np.random.default_rng(0).integers(n_tokens, size=(80, length))
    ]
    train_rows, canaries = hold_out_canaries(rows, n_members=40, n_non_members=40, seed=0)
    ids = torch.tensor([row["input_ids"] for row in train_rows])
    # A table of the next token by position and token: causal, and quick to memorize with.
    model = nn.Embedding(length * n_tokens, n_tokens)
    with torch.no_grad():
        model.weight.copy_(torch.randn(model.weight.shape, generator=generator))

    def logits(module: nn.Module, input_ids: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1]) * n_tokens
        table: torch.Tensor = module(input_ids + places)
        return table

    auditor = PrivacyAuditor(canaries, logits_fn=logits, on_error="raise", restore=False, assume_seen=True)
    before = auditor.begin(model).metrics["auc"].value
    # By hand: the first optimizer of a process loads torch's compiler, which takes seconds.
    for _ in range(30):
        predicted = logits(model, ids, torch.ones_like(ids))[:, :-1]
        loss = nn.functional.cross_entropy(predicted.flatten(0, 1), ids[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, [model.weight])
        with torch.no_grad():
            model.weight -= 100.0 * gradient
    after = auditor.audit(model).metrics["auc"].value
    found = f"AUC {before:.3f} before training, {after:.3f} after, in {time.perf_counter() - started:.1f} s"
    if before != 0.5 or after is None or after < 0.9:
        return Check("self-test", "problem", found, "expected 0.5 and more than 0.9: please report this")
    return Check("self-test", "ok", found, "a tiny model memorized its members")
