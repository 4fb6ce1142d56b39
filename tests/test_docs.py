"""What documentation and examples name can be imported as it stands there, from public places alone."""

import ast
import json
import re
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
from public_packages import NOT_IMPORTABLE
from public_packages import PUBLIC as IMPORTABLE

import ezmia_callbacks

ROOT = Path(__file__).parents[1]
PUBLIC = IMPORTABLE | NOT_IMPORTABLE.keys()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".ipynb"))
# A dotted path, but not one of a file (`ezmia_callbacks/...`), and not the attribute of a value.
_DOTTED = re.compile(r"\bezmia_callbacks(?:\.\w+)+")
_IMPORT = re.compile(r"^[ \t>]*((?:from ezmia_callbacks[\w.]* import (?:\([^)]*\)|[^\n]+)))", re.MULTILINE)


def public_names(module):
    if module in NOT_IMPORTABLE:
        return NOT_IMPORTABLE[module]
    return set(import_module(module).__all__)


def text_of(path):
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) + "\n" for cell in cells)


def private_imports_in(text):
    found = []
    for statement in _IMPORT.findall(text):
        (node,) = ast.parse(textwrap.dedent(statement)).body
        module, names = node.module, {alias.name for alias in node.names}
        is_public = module in PUBLIC and names <= public_names(module) | {"__version__"}
        # A public package may be imported from the one above it.
        if not is_public and not {f"{module}.{name}" for name in names} <= PUBLIC:
            found.append(statement)
    return found


def private_paths_in(text):
    def is_public(path):
        package = max((p for p in PUBLIC if path == p or path.startswith(f"{p}.")), key=len)
        name = path.removeprefix(package).strip(".").partition(".")[0]
        return not name or name in public_names(package)

    return sorted({path for path in _DOTTED.findall(_IMPORT.sub("", text)) if not is_public(path)})


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_names_are_imported_and_named(path):
    text = text_of(path)

    assert private_imports_in(text) == []
    assert private_paths_in(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "from ezmia_callbacks.canaries.sets import CanarySet",
        "    from ezmia_callbacks.results import _plain",
        "from ezmia_callbacks.scoring import (\n    SCORES,\n    forward,\n)",
        "from ezmia_callbacks.audit.auditor import PrivacyAuditor",
    ],
)
def test_a_private_import_is_seen(text):
    assert len(private_imports_in(text)) == 1


def test_a_private_path_is_seen():
    assert private_paths_in("see `ezmia_callbacks.audit.judge.Judge` and ezmia_callbacks.scoring.SCORES") == [
        "ezmia_callbacks.audit.judge.Judge"
    ]


def test_every_public_package_says_what_is_public():
    for module in IMPORTABLE:
        assert public_names(module), module
    assert ezmia_callbacks.__doc__
