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

PACKAGE = Path(ezmia_callbacks.__file__).parent
ROOT = Path(__file__).parents[1]
PUBLIC = IMPORTABLE | NOT_IMPORTABLE.keys()
MAP = ROOT / "CONTRIBUTING.md"
PAGES = sorted([ROOT / "README.md", MAP, *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".sh", ".ipynb"))
# A dotted path, but not one of a file (`ezmia_callbacks/...`), and not the attribute of a value.
_DOTTED = re.compile(r"\bezmia_callbacks(?:\.\w+)+")
# A file of the repository, and not the end of an address.
_FILE = re.compile(r"(?<![\w/.-])(?:tests|benchmarks|docs|examples|ezmia_callbacks)/[a-z0-9_/.-]+\.[a-z]+")
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


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(path):
    missing = [name for name in _FILE.findall(text_of(path)) if not (ROOT / name).exists()]

    assert missing == []


def section(title):
    """One section of the map, without its heading."""
    return re.split(r"^##+ ", MAP.read_text("utf-8").partition(f"# {title}\n")[2], maxsplit=1, flags=re.M)[0]


def places_by_row():
    """The folders and files of the package that each row of the map names, by their names without suffix."""
    table = [line.split("|") for line in section("Where does it live?").splitlines() if line.startswith("|")]
    found = [re.findall(r"`(\w+)(?:/|\.py)`", cells[2]) for cells in table]
    return [set(names) for names in found if names]


def test_the_map_has_every_place_of_the_package():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}

    assert folders | files <= set().union(*places_by_row())


def test_places_of_the_map_import_from_rows_above():
    row_of = {}
    for number, names in enumerate(places_by_row()):
        row_of = {name: number for name in names} | row_of
    against = set()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imported = re.findall(r"(?:from|import) ezmia_callbacks\.(\w+)", path.read_text("utf-8"))
        against |= {(own, name) for name in imported if own != "__init__" and row_of[name] > row_of[own]}

    assert against == set()


def test_what_the_map_names_is_defined_where_it_says():
    text = section("Where does it live?") + section("One walk: `canaries`, from the callback to the decision")
    pairs = [(name, file) for file, name in re.findall(r"`([\w/]+\.py)` `(\w+)`", text)]
    pairs += re.findall(r"`(?:\w+\.)?(\w+)(?:\(\w+\))?` (?:in\s+|\()`([\w/]+\.py)`", text)

    undefined = [
        (name, file)
        for name, file in pairs
        if not re.search(rf"(?:def|class) {name}\b", (PACKAGE / file).read_text("utf-8"))
    ]

    assert len(pairs) > 20
    assert undefined == []


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
