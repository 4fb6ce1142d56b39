"""Where a package touches what a framework keeps private."""

import ast
from collections.abc import Iterator
from pathlib import Path

# Attributes of Python itself.
_PYTHONS_OWN = {"_getframe"}


def private_names_in(source: str) -> Iterator[str]:
    """Attributes with one leading underscore of anything but the object itself, in `getattr` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
            is_own = isinstance(owner, ast.Name) and owner.id in ("self", "cls", "other")
            if not is_own and name.startswith("_") and not name.startswith("__"):
                yield name
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = getattr(node.args[1], "value", "")
            if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
                yield name


def private_names_outside(package: Path, *, file: str, own: set[str] = frozenset()) -> dict[str, list[str]]:
    """Private names of others, by the file that touches them, in all files but one.

    Args:
        package: The folder.
        file: The file that may touch them.
        own: Private names of this project's own classes.
    """
    found = {
        path.name: sorted(set(private_names_in(path.read_text("utf-8"))) - _PYTHONS_OWN - own)
        for path in sorted(package.glob("*.py"))
        if path.name != file
    }
    return {name: names for name, names in found.items() if names}
