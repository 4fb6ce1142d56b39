"""The command line of a run as it may be shown to others: its program and options, and few of its values.

A value may be a path, a text, a name or a secret, and nothing in it says so: what is not known to be harmless
is left out.
"""

import re
from collections.abc import Sequence

__all__: list[str] = []

_LEFT_OUT = "…"
# `--name`, `-n`, and the keys of overrides, `trainer.lr=0.1`, each with what stands right behind it. Base64
# may end in `=`: after that of a key something has to follow.
_OPTION = re.compile(
    r"(--[a-z][\w.-]{0,59}(?==|\Z)|-[a-z]|(?-i:\+{0,2}[a-z][a-z0-9_./]{0,59}(?==[^=])))(=?)(.*)",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)
# Of no more digits than eight: longer ones are numbers of telephones, accounts and people.
_HARMLESS = re.compile(
    r"[+-]?([0-9]{1,8}(\.[0-9]{0,8})?|\.[0-9]{1,8})(e[+-]?[0-9]{1,3})?|true|false|none|null|yes|no|on|off",
    re.IGNORECASE,
)
_SECRET = re.compile(r"(?i)(token|key|secret|pass(w|ph|code|\b)|pwd|credential|auth|\bpin\b)")


def without_values(arguments: Sequence[str]) -> str:
    """A command line with its program's name, its options, and the values that are known to be harmless.

    These are numbers and truth values, but for those of options that are named like a secret.

    Args:
        arguments: As `sys.argv` has them.

    >>> without_values(["/home/ann/train.py", "--lr", "1e-4", "--prompt", "My number is"])
    'train.py --lr 1e-4 --prompt …'
    """
    if not arguments:
        return ""
    program, *others = arguments
    shown = [re.split(r"[/\\]", program)[-1] or _LEFT_OUT]
    follows_secret = only_values_follow = False
    for argument in others:
        found = None if follows_secret or only_values_follow else _OPTION.fullmatch(argument)
        if found is None:
            is_border = argument == "--"
            shown.append(argument if is_border else _shown(argument, is_secret=follows_secret))
            follows_secret, only_values_follow = False, only_values_follow or is_border
            continue
        name, equals, value = found.groups()
        is_secret = _SECRET.search(name) is not None
        shown.append(name + equals + (_shown(value, is_secret=is_secret) if value else ""))
        follows_secret = is_secret and not equals and not value
    return " ".join(shown)


def _shown(value: str, *, is_secret: bool) -> str:
    return value if _HARMLESS.fullmatch(value) and not is_secret else _LEFT_OUT
