"""Models whose folders bring code along, and the command where any connection is a failure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from adapters import edit_json

CONFIGURATION = """
from transformers import GPT2Config

class TalkingConfig(GPT2Config):
    model_type = "talking"
"""
MODEL = """
import ctypes, os, pathlib, warnings
from transformers import GPT2LMHeadModel
from .configuration_talking import TalkingConfig

pathlib.Path({marker!r}).write_text("ran")
print("printed by Python")
os.write(1, b"written by the system\\n")
ctypes.CDLL(None).puts(b"printed by C")
warnings.warn("warned by Python")

class TalkingModel(GPT2LMHeadModel):
    config_class = TalkingConfig
"""

# Every connection is refused, and written down.
COMMAND_WITHOUT_NETWORK = """
import socket, sys

def refuse(*arguments, **options):
    with open({log!r}, "a") as log:
        log.write(repr(arguments[-2:]) + "\\n")
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from ezmia_callbacks.cli.command import main
main()
"""


def talking_copy(source: Path, folder: Path, *, marker: Path) -> Path:
    """A copy of a model that needs code of its own, which writes a file and prints when it runs."""
    shutil.copytree(source, folder)
    (folder / "configuration_talking.py").write_text(CONFIGURATION)
    (folder / "modeling_talking.py").write_text(MODEL.format(marker=str(marker)))
    edit_json(
        folder / "config.json",
        model_type="talking",
        auto_map={
            "AutoConfig": "configuration_talking.TalkingConfig",
            "AutoModelForCausalLM": "modeling_talking.TalkingModel",
        },
    )
    return folder


def ezmia_without_network(*arguments, home: Path, answers: str = "", is_offline: bool = False):
    """Outcome of the command, and the connections that it tried; its cache of the hub is in `home`."""
    log = home / "connections.txt"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    environment |= {"HF_HUB_OFFLINE": "1"} if is_offline else {}
    outcome = subprocess.run(
        [sys.executable, "-c", COMMAND_WITHOUT_NETWORK.format(log=str(log)), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        input=answers,
        env=environment,
    )
    return outcome, log.read_text().splitlines()


def put_into_cache(model: Path, name: str, *, home: Path) -> None:
    """Lay a model down as the hub's client does what it has fetched."""
    revision = "0" * 40
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
