"""Where a package touches what a framework keeps private."""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ezmia_callbacks"


def borrowed_names_in(source: str) -> Iterator[str]:
    """Attributes of anything but the object itself, in `getattr` and its kin too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = getattr(node.args[1], "value", "")
            if isinstance(name, str):
                yield name


def private_names_in(source: str) -> Iterator[str]:
    """Those of them with one leading underscore."""
    for name in borrowed_names_in(source):
        if name.startswith("_") and not name.startswith("__"):
            yield name


def private_names_outside(folder: Path, *, file: str, own: Collection[str] = ()) -> dict[str, list[str]]:
    """Private names of others, by the file that touches them, in all files of a folder but one.

    Args:
        folder: The folder.
        file: The file that may touch them.
        own: Private names of this project's own classes.
    """
    found = {
        path.name: sorted(set(private_names_in(path.read_text("utf-8"))) - set(own))
        for path in sorted(folder.glob("*.py"))
        if path.name != file
    }
    return {name: names for name, names in found.items() if names}


def files_that_touch(names: Collection[str], *, but: Path) -> dict[str, list[str]]:
    """Which of some names are touched in this project, by file, in all files but one."""
    found = {
        str(path.relative_to(PACKAGE)): sorted(set(borrowed_names_in(path.read_text("utf-8"))) & set(names))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != but
    }
    return {file: touched for file, touched in found.items() if touched}
