"""Real processes that train together; what each does stands in a module that a spawned process can import."""

import datetime
import faulthandler
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ezmia_callbacks.distributed import gather

# Seconds that a process waits for another one, and that a test waits for all: a hang fails, it does not hang.
_PATIENCE = 90
_LIMIT = 400


Body = Callable[[int, Path], Any]
"""(rank, a folder of its own that all processes share) -> what a test wants to see."""


def run_processes(bodies: Sequence[Body], n: int, folder: Path) -> dict[str, list[Any]]:
    """What each body returns in each of `n` processes that form one group, by the body's name.

    One group runs all bodies, one after the other: starting processes is what takes time.
    """
    try:
        return _attempt(bodies, n, folder / "first")
    except mp.ProcessExitedException as error:
        # Gloo's own threads abort a process now and then, on a loaded machine. A fault of ours aborts again.
        if error.signal_name != "SIGABRT":
            raise
        sys.stderr.write(f"{error}; once more. {_tracebacks(folder / 'first')}\n")
        return _attempt(bodies, n, folder / "second")


def _attempt(bodies: Sequence[Body], n: int, folder: Path) -> dict[str, list[Any]]:
    folder.mkdir(parents=True)
    context = mp.spawn(_run, args=(n, folder, bodies), nprocs=n, join=False)
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=_LIMIT)
    try:
        while not context.join(timeout=5):
            assert datetime.datetime.now() < deadline, "a process hangs"
    finally:
        for process in context.processes:
            process.kill()
    returned = [torch.load(folder / f"returned-{rank}.pt", weights_only=False) for rank in range(n)]
    return {body.__name__: [own[body.__name__] for own in returned] for body in bodies}


def _tracebacks(folder: Path) -> str:
    """What the processes of a failed attempt were doing when a signal ended them."""
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("crash-*.txt")))


def _run(rank: int, n: int, folder: Path, bodies: Sequence[Body]) -> None:
    faulthandler.enable((folder / f"crash-{rank}.txt").open("w"))
    torch.set_num_threads(1)
    # What torchrun sets; Accelerate and Lightning look for it.
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=n,
        timeout=datetime.timedelta(seconds=_PATIENCE),
    )
    returned = {}
    for body in bodies:
        own = folder / body.__name__
        own.mkdir(exist_ok=True)
        returned[body.__name__] = body(rank, own)
    torch.save(returned, folder / f"returned-{rank}.pt")
    # Whoever closes its connections first makes the threads of the others throw: all arrive, then all leave,
    # and without the interpreter's own end, in which those threads still run.
    gather(None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
