"""Prints how the package is built: modules, import arrows, the longest file, the largest class.

    python benchmarks/structure.py [FOLDER OF A PACKAGE]

Read from the source alone; nothing of the package is imported.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "ezmia_callbacks"


class Module(NamedTuple):
    """One file of the package."""

    name: str
    place: str
    tree: ast.Module
    n_lines: int


class Class(NamedTuple):
    """One class, with what makes it large."""

    name: str
    n_methods: int
    n_lines: int
    n_attributes: int
    n_changed_later: int


def modules_of(package: Path) -> dict[str, Module]:
    """All modules by their dotted names within the package; an `__init__` goes by its folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        source = path.read_text("utf-8")
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        place = parts[0] if len(parts) > 1 else name
        found[name] = Module(name, place, ast.parse(source), source.count("\n"))
    return found


def imports_of(module: Module, known: dict[str, Module], package: str) -> set[str]:
    """Names of the package's other modules that a module imports, wherever in it."""
    targets = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            targets |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
    return {
        name for target in targets if (name := _module(target, known, package)) not in (None, module.name)
    }


def _module(target: str, known: dict[str, Module], package: str) -> str | None:
    """The longest beginning of a dotted target that is a module; None if it is another package's."""
    if target != package and not target.startswith(f"{package}."):
        return None
    parts = target.split(".")[1:]
    return next((n for k in range(len(parts), -1, -1) if (n := ".".join(parts[:k])) in known), None)


def classes_of(module: Module) -> Iterator[Class]:
    """Every class of a module."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
            first = {name for m in methods if m.name == "__init__" for name in _assigned(m)}
            later = {name for m in methods if m.name != "__init__" for name in _assigned(m)}
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Class(node.name, len(methods), n_lines, len(first | later), len(later))


def _assigned(method: ast.AST) -> set[str]:
    """Attributes that a method assigns on its object."""
    return {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def main() -> None:
    """Print the lines."""
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    modules = modules_of(package)
    arrows = {
        (name, target)
        for name, module in modules.items()
        for target in imports_of(module, modules, package.name)
    }
    places = {module.place for module in modules.values()}
    between = {(modules[a].place, modules[b].place) for a, b in arrows}
    longest = max(modules.values(), key=lambda module: module.n_lines)
    classes = [(module, found) for module in modules.values() for found in classes_of(module)]
    print(f"modules: {len(modules)}, of which {len(list(package.glob('*.py')))} lie in the root")
    print(f"places (folders, and files of the root): {len(places)}")
    print(f"import arrows between modules: {len(arrows)}")
    print(f"import arrows between places: {sum(a != b for a, b in between)}")
    print(f"longest file: {longest.name} ({longest.n_lines} lines)")
    for label, key in (("methods", lambda c: c[1].n_methods), ("lines", lambda c: c[1].n_lines)):
        module, found = max(classes, key=key)
        print(f"largest class by {label}: {module.name}.{found.name} ({key((module, found))} {label})")
    for module, found in classes:
        if found.name == "PrivacyAuditor":
            print(
                f"{module.name}.PrivacyAuditor: {found.n_methods} methods, {found.n_attributes} attributes, "
                f"{found.n_changed_later} of them assigned after construction"
            )


if __name__ == "__main__":
    main()
