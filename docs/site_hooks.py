"""Links that work in the repository must not break the site, which holds only what is in `docs/`."""

import posixpath
import re
from typing import Any

_RELATIVE_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)\s#]*)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with links to repository files outside `docs/` as plain text."""
    folder = posixpath.dirname(page.file.src_uri)

    def kept_or_text(link: re.Match[str]) -> str:
        is_outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if is_outside else link[0]

    return _RELATIVE_LINK.sub(kept_or_text, markdown)
