"""The model that each checkpoint is compared with, and where it is loaded from.

An adapter names its base in a file that came with it: that name is looked up on this machine alone, unless
the user allows a download, and it never overrules the base that the user names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.post_hoc.checkpoints import Checkpoint
from ezmia_callbacks.post_hoc.twins import is_same_model

__all__: list[str] = []


@dataclass(frozen=True)
class Base:
    """A model that checkpoints are compared with.

    Attributes:
        name: Path or hub id, as it was named.
        source: What to load: a folder, or a hub id.
        revision: Revision of a hub id; None for the current one.
        is_on_this_machine: Whether nothing may be fetched for it.
    """

    name: str
    source: str
    revision: str | None
    is_on_this_machine: bool


def bases_of(
    checkpoints: Sequence[Checkpoint],
    base: str | Path | None,
    *,
    allow_other_base: bool,
    allow_download: bool,
) -> list[Base]:
    """The base of each checkpoint: the one that the user names, or the one that its adapter names.

    Args:
        checkpoints: The checkpoints.
        base: Path or hub id that the user names; None leaves it to the adapters.
        allow_other_base: Whether it may be another than an adapter names.
        allow_download: Whether a base that only an adapter names may be fetched from a hub.

    Raises:
        ConfigurationError: if a checkpoint has no base, or one that is not there, or another than the one
            that the user names, or is its own.
    """
    if not checkpoints:
        raise ConfigurationError("Got no checkpoints: see `find_checkpoints`.")
    bases = []
    for checkpoint in checkpoints:
        if base is None:
            found = _base_named(checkpoint, allow_download=allow_download)
        else:
            if not allow_other_base:
                _check_is_base_named(checkpoint, str(base))
            found = _base_given(checkpoint, str(base))
        if Path(found.source).is_dir() and Path(found.source).resolve() == checkpoint.path.resolve():
            raise ConfigurationError(
                f"The base and the checkpoint are the same folder, {str(checkpoint.path)!r}: the base is the "
                "model that the run started from."
            )
        bases.append(found)
    return bases


def _base_given(checkpoint: Checkpoint, name: str) -> Base:
    # The user has named it: a hub id may be fetched.
    revision = checkpoint.base_revision if checkpoint.base_named == name else None
    if Path(name).is_dir():
        return Base(name, name, None, is_on_this_machine=True)
    return Base(name, name, revision, is_on_this_machine=False)


def _base_named(checkpoint: Checkpoint, *, allow_download: bool) -> Base:
    name, revision = checkpoint.base_named, checkpoint.base_revision
    if name is None:
        raise ConfigurationError(
            f"{str(checkpoint.path)!r} does not say which model it was trained from: name it (--base)."
        )
    folder = _folder_of(name, revision)
    if folder is not None:
        return Base(name, str(folder), None, is_on_this_machine=True)
    if allow_download and not Path(name).is_absolute():
        return Base(name, name, revision, is_on_this_machine=False)
    raise ConfigurationError(
        f"The adapter {str(checkpoint.path)!r} names {name!r} as its base, which is neither a folder here "
        "nor in the local cache of the hub: name the base yourself (--base), or let it be fetched "
        "(--allow-download)."
    )


def _check_is_base_named(checkpoint: Checkpoint, base: str) -> None:
    named, revision = checkpoint.base_named, checkpoint.base_revision
    if named is None or named == base:
        return
    folders = _folder_of(named, revision), _folder_of(base, None)
    if None not in folders:
        one, other = folders
        if one == other or is_same_model(one, other):  # type: ignore[arg-type]  # neither is None
            return
    raise ConfigurationError(
        f"The adapter {str(checkpoint.path)!r} names {named!r} as its base, and {base!r} was given: on "
        "another base it is another model. Leave --base out, or say that it is right all the same "
        "(--allow-other-base), as for a copy of the same model."
    )


def _folder_of(name: str, revision: str | None) -> Path | None:
    """A model's folder on this machine; None if it is not here."""
    if Path(name).is_dir():
        return Path(name).resolve()
    try:
        import huggingface_hub
    except ImportError:
        return None
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache; not the name of a repository
        return None
