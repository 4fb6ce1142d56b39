"""Who may import what: every module imports from its own row or from rows above it, never from below."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ezmia_callbacks

PACKAGE = "ezmia_callbacks"
ROOT = Path(ezmia_callbacks.__file__).parent


class Row(NamedTuple):
    """Places that stand side by side, and the packages that they may import besides those of rows above."""

    places: frozenset[str]
    packages: frozenset[str]
    # A shell over one framework: no other shell sees it or its framework.
    is_shell: bool = False


# A place is a folder of the package, with all that lies in it, or a file beside the folders; "" is the
# package itself, which loads the lower rows lazily. A file may stand in a stricter row than its folder.
ROWS = (
    Row(
        frozenset({"array_files", "errors", "files", "safe_text", "typed_rows"}),
        frozenset({"numpy", "safetensors"}),
    ),
    Row(frozenset({"functional"}), frozenset({"scipy", "sklearn"})),
    Row(frozenset({"canaries"}), frozenset()),
    Row(frozenset({"results"}), frozenset()),
    Row(frozenset({"scoring.rows", "scoring.statistics", "scoring.attack"}), frozenset()),
    Row(frozenset({"measuring"}), frozenset()),
    Row(frozenset({"report"}), frozenset()),
    Row(frozenset({"audit.judge", "audit.economy", "audit.outcome"}), frozenset()),
    Row(frozenset({"console", "distributed", "divisions", "scoring"}), frozenset({"torch", "tqdm"})),
    Row(frozenset({"reference"}), frozenset()),
    Row(frozenset({"audit"}), frozenset({"filelock"})),
    Row(frozenset({"shells"}), frozenset()),
    Row(frozenset({"huggingface"}), frozenset({"transformers"}), is_shell=True),
    Row(frozenset({"lightning"}), frozenset({"lightning", "pytorch_lightning"}), is_shell=True),
    Row(frozenset({"lightning_factory"}), frozenset()),
    Row(frozenset({"axolotl"}), frozenset({"axolotl", "pydantic"})),
    Row(frozenset({"post_hoc"}), frozenset({"huggingface_hub", "peft"})),
    Row(frozenset({"", "cli", "demo"}), frozenset({"typer", "rich"})),
)

# Everything above the first row that may import torch.
N_ROWS_WITHOUT_TORCH = next(i for i, row in enumerate(ROWS) if "torch" in row.packages)

# Allowed inside functions only: {(module, package): reason}.
EXCEPTIONS = {
    ("canaries.hold_out", "torch"): "a subset of a torch dataset; drawing from anything else needs no torch",
    (
        "canaries.synthetic.insertion",
        "torch",
    ): "a torch dataset with rows put in; anything else needs no torch",
    (
        "canaries.synthetic.insertion",
        "datasets",
    ): "a datasets.Dataset with rows put in, which brings it along",
    ("canaries.validity.near_duplicates", "datasketch"): "loads when texts are compared",
    ("canaries.record_files", "pyarrow"): "an optional package that loads when a Parquet file is read",
    ("results.tables", "pandas"): "an optional package that loads when a data frame is asked for",
    ("report.drawing", "matplotlib"): "an optional package that loads when a plot is drawn",
    ("report.html", "jinja2"): "an optional package that loads when a page is written",
    ("report.plots", "matplotlib"): "an optional package that loads when a plot is drawn",
    ("huggingface.trl", "datasets"): "TRL prepares nothing else, and brings it along",
    ("audit.zero", "deepspeed"): "loads when a model that it trains is put back",
    ("reference.pretrained", "transformers"): "a checkpoint, as the reference or to be audited",
    ("demo.base_model", "tokenizers"): "the demo trains its own tokenizer; comes with transformers",
}


class Import(NamedTuple):
    """One import statement's target."""

    target: str
    line: int
    is_in_function: bool
    is_for_typing: bool


def imports_of(source: str, *, module: str, is_package: bool = False) -> list[Import]:
    """Everything that a module imports, wherever the statement stands; targets are absolute dotted names."""
    here = [PACKAGE, *module.split(".")] if module else [PACKAGE]

    def targets(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = here[: len(here) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            return [f"{base}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                return [str(node.args[0].value)]
        return []

    def walk(node: ast.AST, *, in_function: bool, for_typing: bool) -> Iterator[Import]:
        for target in targets(node):
            yield Import(target, getattr(node, "lineno", 0), in_function, for_typing)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, in_function=in_function, for_typing=True)
            for child in node.orelse:
                yield from walk(child, in_function=in_function, for_typing=for_typing)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_function=in_function, for_typing=for_typing)

    return list(walk(ast.parse(source), in_function=False, for_typing=False))


def row_of(module: str) -> int | None:
    """Number of the row in which a module stands, without the package's name; None if in none."""
    parts = module.split(".")
    for i, row in enumerate(ROWS):
        if any(".".join(parts[:n]) in row.places for n in range(len(parts), 0, -1)):
            return i
    return None


def visible_rows(own_row: int) -> list[int]:
    """The rows that a row may import from."""
    is_hidden = [row.is_shell and ROWS[own_row].is_shell for row in ROWS]
    return [i for i in range(own_row + 1) if i == own_row or not is_hidden[i]]


def violations(source: str, *, module: str, is_package: bool = False) -> list[str]:
    """What a module imports against the table; empty if nothing."""
    own_row = row_of(module)
    if own_row is None:
        return [f"{module} stands in no row: give it a place in the table of tests/test_layers.py"]
    visible = visible_rows(own_row)
    packages = frozenset().union(*(ROWS[i].packages for i in visible))
    found = []
    for target, line, is_in_function, is_for_typing in imports_of(
        source, module=module, is_package=is_package
    ):
        top, _, rest = target.partition(".")
        if top == PACKAGE:
            # A name that is no module is taken from the package itself.
            row = row_of(rest)
            row = row_of("") if row is None else row
            if row not in visible:
                found.append(f"{module}:{line} imports {target} from a row below its own, or another shell")
        elif not (
            is_for_typing
            or top in sys.stdlib_module_names
            or top in packages
            or (is_in_function and (module, top) in EXCEPTIONS)
        ):
            found.append(f"{module}:{line} imports {top}, which its row may not")
    return found


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_from_their_own_row_or_above(module):
    path = MODULES[module]

    found = violations(path.read_text("utf-8"), module=module, is_package=path.name == "__init__.py")

    assert found == []


def test_the_package_itself_loads_only_the_rows_without_torch():
    eager = [
        found.target.partition(".")[2]
        for found in imports_of(MODULES[""].read_text("utf-8"), module="", is_package=True)
        if found.target.startswith(PACKAGE) and not found.is_for_typing
    ]

    assert eager
    assert {row_of(target) for target in eager} <= set(range(N_ROWS_WITHOUT_TORCH))


def test_every_exception_is_still_used_and_has_a_reason():
    used = {
        (module, found.target.partition(".")[0])
        for module, path in MODULES.items()
        for found in imports_of(path.read_text("utf-8"), module=module, is_package=path.name == "__init__.py")
        if not found.is_for_typing
    }

    assert set(EXCEPTIONS) <= used
    assert all(EXCEPTIONS.values())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.roc", "import torch"),
        ("functional.roc", "import pandas as pd"),
        ("functional.roc", "import jaxtyping"),
        ("functional.roc", "def f():\n    import torch"),
        ("functional.roc", "class A:\n    async def f(self):\n        from torch import nn"),
        ("functional.roc", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("functional.roc", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
        ("functional.roc", "import importlib\nimportlib.import_module('torch')"),
        ("functional.roc", "from ezmia_callbacks.results.history import AuditHistory"),
        ("functional.roc", "from ezmia_callbacks.results import AuditHistory"),
        ("functional.roc", "from ezmia_callbacks import AuditHistory"),
        ("functional.roc", "from ..results import AuditHistory"),
        ("functional.roc", "from .. import results"),
        ("functional", "from ..results import AuditHistory"),
        ("canaries.hold_out", "import torch"),
        ("canaries.sets", "def f():\n    import torch"),
        ("results.result", "import torch"),
        ("scoring.statistics", "import torch"),
        ("scoring.rows", "from ezmia_callbacks.scoring.forward import token_statistics"),
        ("measuring.figures", "from ezmia_callbacks.scoring.scorer import Scorer"),
        ("audit.judge", "import torch"),
        ("audit.judge", "from ezmia_callbacks.audit.auditor import PrivacyAuditor"),
        ("report.plots", "import matplotlib"),
        ("report.plots", "from ezmia_callbacks.audit.auditor import PrivacyAuditor"),
        ("audit.auditor", "import transformers"),
        ("audit.auditor", "from ezmia_callbacks.huggingface import PrivacyAuditCallback"),
        ("audit.auditor", "from ezmia_callbacks.shells.feed import as_trained"),
        ("audit.auditor", "def f():\n    from ezmia_callbacks import huggingface"),
        (
            "audit.auditor",
            "if TYPE_CHECKING:\n    from ezmia_callbacks.huggingface import PrivacyAuditCallback",
        ),
        ("shells.feed", "import transformers"),
        ("shells.feed", "from ezmia_callbacks.huggingface.trl import is_packed"),
        ("huggingface.callback", "import lightning"),
        ("huggingface.callback", "from ezmia_callbacks.lightning import PrivacyAuditCallback"),
        ("huggingface.callback", "from ezmia_callbacks.cli.command import main"),
        ("lightning.callback", "import transformers"),
        ("lightning.callback", "from ezmia_callbacks.huggingface import PrivacyAuditCallback"),
        ("lightning.callback", "from ezmia_callbacks import LightningPrivacyAuditCallback"),
        ("brand_new", "import math"),
    ],
)
def test_a_forbidden_import_is_caught(module, source):
    assert len(violations(source, module=module, is_package=module == "functional")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.roc", "import math, numpy.linalg\nfrom scipy import stats"),
        ("functional.roc", "if TYPE_CHECKING:\n    from jaxtyping import Bool"),
        (
            "functional.roc",
            "from . import scores\nfrom .scores import ez_score\nfrom ..errors import AuditError",
        ),
        ("functional", "from . import scores\nfrom .scores import ez_score\nfrom ..errors import AuditError"),
        ("canaries.hold_out", "def f():\n    from torch.utils.data import Subset"),
        ("results.history", "from ezmia_callbacks.functional import auc"),
        ("measuring.figures", "from ezmia_callbacks.scoring.statistics import TokenStatistics"),
        ("audit.auditor", "import torch.distributed\nfrom ezmia_callbacks.results import history"),
        (
            "huggingface.callback",
            "import transformers\nfrom ezmia_callbacks.audit.auditor import PrivacyAuditor",
        ),
        ("lightning.callback", "import lightning.pytorch, torch\nfrom ezmia_callbacks.shells import feed"),
        ("cli.command", "import typer\nfrom ezmia_callbacks import __version__, huggingface"),
    ],
)
def test_an_allowed_import_is_let_through(module, source):
    assert violations(source, module=module, is_package=module == "functional") == []
