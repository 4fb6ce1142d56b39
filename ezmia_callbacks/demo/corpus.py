"""Real English text that every installation holds: the documentation inside Python source.

Sources are parsed with `ast`; nothing is imported and nothing is downloaded.
"""

import ast
import importlib.util
import inspect
import itertools
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ezmia_callbacks.canaries.record_files import read_record_file
from ezmia_callbacks.canaries.records import record_text
from ezmia_callbacks.errors import ConfigurationError

__all__: list[str] = []

MIN_CHARACTERS = 160
MAX_CHARACTERS = 320

# API documentation repeats its shared paragraphs: a member must not be a near copy of a non-member.
_N_RUN_WORDS = 4
_MAX_SEEN_SHARE = 0.25
_MIN_LETTER_SHARE = 0.93
_MIN_WORDS = 4
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "externals",
        "_vendor",
        "__pycache__",
    }
)

_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(])")
_SECTION_RULE = re.compile(r"^\s*[-=~^*]{3,}\s*$", re.MULTILINE)
_CODE_OR_MARKUP = re.compile(r">>>|^\s*\.\. |^\s*[-*+|$#:\[] ?|^\s*\S+ : |::\s*$", re.MULTILINE)
_WORD = re.compile(r"[^\W_]+")


def standard_library_docstrings() -> list[str]:
    """Distinct prose passages from the documentation of Python's standard library, in fixed order.

    Every passage of the docstrings, then of the texts behind `help("topics")`. Each one has
    `MIN_CHARACTERS` to `MAX_CHARACTERS` characters and ends with a sentence. Order and content
    depend on the Python version alone.

    Raises:
        ConfigurationError: if this Python comes without its source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documentation = itertools.chain(_docstrings_below(root), _help_topics(root))
    records = _without_near_copies(passage for text in documentation for passage in _passages(text))
    if not records:
        raise ConfigurationError(
            f"No documented source of Python's standard library was found in {str(root)!r}: "
            "use a Python that is installed with its .py files."
        )
    return records


def package_docstrings(*names: str) -> list[str]:
    """Distinct prose passages from the documentation of installed packages, in fixed order.

    The first passage of each docstring only, so that records are not continuations of each other.
    Each one has `MIN_CHARACTERS` to `MAX_CHARACTERS` characters and ends with a sentence. Order and
    content depend on the installed versions alone. The packages are not imported.

    Args:
        names: Top-level import names such as "scipy" or "sklearn".

    Raises:
        ConfigurationError: if one is not installed, or comes without documented source files.
    """
    firsts: list[str] = []
    for name in names:
        found = [
            passage
            for text in _docstrings_below(_package_folder(name))
            for passage in itertools.islice(_passages(text), 1)
        ]
        if not found:
            raise ConfigurationError(
                f"Package {name!r} holds no documented source file: "
                "install it with its .py files, or pass your own text."
            )
        firsts += found
    return _without_near_copies(firsts)


def records_from_file(path: str | Path) -> list[str]:
    r"""Distinct texts of a file of records, in the file's order.

    Raises:
        ConfigurationError: if the file cannot be read, or holds a record without text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "notes.txt"
    ...     _ = path.write_text("A first record.\n\nA second one.\n")
    ...     records_from_file(path)
    ['A first record.', 'A second one.']
    """
    texts = [record_text(record) for record in read_record_file(path).records()]
    if None in texts:
        raise ConfigurationError(
            f"{str(path)!r}, row {texts.index(None) + 1}: token ids without text, which the demo tokenizes: "
            "give it the texts."
        )
    return list(dict.fromkeys(text.strip() for text in texts if text and text.strip()))


def _package_folder(name: str) -> Path:
    # A dotted name would make `find_spec` import the parent.
    specification = importlib.util.find_spec(name) if name.isidentifier() else None
    if specification is None or not specification.submodule_search_locations:
        raise ConfigurationError(
            f"{name!r} is not an installed top-level package: install it, or pass your own text."
        )
    return Path(next(iter(specification.submodule_search_locations)))


def _help_topics(root: Path) -> Iterator[str]:
    """The chapters of the language reference that `help()` shows, from its one large literal."""
    try:
        tree = ast.parse((root / "pydoc_data" / "topics.py").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _without_near_copies(passages: Iterable[str]) -> list[str]:
    """The passages of which at most `_MAX_SEEN_SHARE` of the word runs stand in earlier ones."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for passage in passages:
        words = _WORD.findall(unicodedata.normalize("NFKC", passage).casefold())
        runs = set(zip(*(words[start:] for start in range(_N_RUN_WORDS)), strict=False))
        if runs and len(runs & seen) <= _MAX_SEEN_SHARE * len(runs):
            kept.append(passage)
        seen |= runs
    return kept


def _docstrings_below(root: Path) -> Iterator[str]:
    return (text for path in _source_paths(root) for text in _docstrings(path))


def _source_paths(root: Path) -> list[Path]:
    """Python files below `root` without its tests and third-party folders, in a fixed order."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in paths if _SKIPPED_FOLDERS.isdisjoint(path.parts))
    return [root / path for path in sorted(kept, key=lambda path: path.parts)]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        source = path.read_bytes()
        # SyntaxWarning: old code is full of invalid escape sequences, which are not our business.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        # Templates and files for another Python version carry a .py ending too.
        return
    nodes: list[ast.stmt | ast.Module] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        # Statements only: walking every expression takes several times longer.
        for block in ("orelse", "body"):
            nodes.extend(reversed(getattr(node, block, ())))


def _passages(documentation: str) -> Iterator[str]:
    """The prose of one text in pieces of the permitted length, cut after sentences."""
    passage = ""
    for paragraph in _PARAGRAPH_BREAK.split(inspect.cleandoc(documentation)):
        if not _is_prose(paragraph):
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            longer = f"{passage} {sentence}".lstrip()
            if len(longer) <= MAX_CHARACTERS:
                passage = longer
                continue
            if len(passage) >= MIN_CHARACTERS:
                yield passage
            passage = sentence if len(sentence) <= MAX_CHARACTERS else ""
    if len(passage) >= MIN_CHARACTERS:
        yield passage


def _is_prose(paragraph: str) -> bool:
    """True for running text: no code, table, heading, list, or parameter description."""
    if paragraph[:1].isspace() or not paragraph.rstrip().endswith((".", "!", "?")):
        return False
    if _SECTION_RULE.search(paragraph) or _CODE_OR_MARKUP.search(paragraph):
        return False
    if any(line[:1].isspace() for line in paragraph.splitlines()):
        return False
    n_letters = sum(character.isalpha() or character in " \n.,'" for character in paragraph)
    is_wordy = n_letters >= _MIN_LETTER_SHARE * len(paragraph)
    return is_wordy and len(paragraph.split()) >= _MIN_WORDS
