"""What the site shows otherwise than the repository: links out of `docs/`, names by public paths."""

import posixpath
import re
from typing import Any

_RELATIVE_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)\s#]*)(?:#[^)\s]*)?\)")
# mkdocstrings says on hovering in which file a name is defined, which is not where it is imported from.
_DEFINED_IN = re.compile(r' title="ezmia_callbacks\.[^"]*"')


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with links to repository files outside `docs/` as plain text."""
    folder = posixpath.dirname(page.file.src_uri)

    def kept_or_text(link: re.Match[str]) -> str:
        is_outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if is_outside else link[0]

    return _RELATIVE_LINK.sub(kept_or_text, markdown)


def on_post_page(output: str, **_: Any) -> str:
    """The page without the files in which names are defined."""
    return _DEFINED_IN.sub("", output)
