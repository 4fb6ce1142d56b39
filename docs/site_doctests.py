"""Doctests of docstrings as code blocks: Markdown would read `>>>` as a quotation in a quotation."""

import re
from typing import Any

from griffe import Extension, Object

# From the first prompt of a paragraph to its end.
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)


class DoctestsAsCode(Extension):
    """Fences every doctest that stands outside a section of its own."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
