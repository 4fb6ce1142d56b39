"""What a run's figures were made with, for whoever has to trust them later."""

import platform
import re
import sys
from datetime import datetime, timezone
from importlib import metadata

__all__ = ["POWER", "run_facts"]

# Name of the fact that says what one audit can find out; reports put it beside the verdict.
POWER = "power of an audit"

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
_SECRET = re.compile(r"(?i)(token|key|secret|password|credential)")


def run_facts() -> dict[str, str]:
    """Time, machine, versions of the packages that matter, and the command, without its secrets."""
    facts = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "command": " ".join(_without_secrets(sys.argv)),
    }
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def _without_secrets(arguments: list[str]) -> list[str]:
    """The command line, with what follows an argument that is named like a secret left out."""
    shown, is_hidden = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if is_hidden:
            shown.append("***")
        elif _SECRET.search(name) and equals:
            shown.append(f"{name}=***")
        else:
            shown.append(argument)
        is_hidden = bool(_SECRET.search(name)) and not equals and name.startswith("-")
    return shown
