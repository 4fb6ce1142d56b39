"""Messages of the package in the words of the command: options instead of arguments of Python."""

import re

__all__: list[str] = []

OPTIONS = {
    "allow_download": "--allow-download",
    "allow_other_base": "--allow-other-base",
    "allow_shift": "--allow-shift",
    "base": "--base",
    "batch_size": "--batch-size",
    "confidence": "--confidence",
    "device": "--device",
    "dtype": "--dtype",
    "expected": "--expected",
    "fpr": "--fpr",
    "max_length": "--max-length",
    "n_audits": "--audits",
    "n_canaries": "--coins",
    "n_members": "--members",
    "n_non_members": "--non-members",
    "non_members_per_member": "--ratio",
    "output_dir": "--output-dir",
    "power": "--power",
    "reference": "--base",
    "rule": "--rule",
    "score": "--score",
    "seed": "--seed",
    "tokenizer": "--tokenizer",
    "trust_remote_code": "--trust-remote-code",
}
"""Options by the names that arguments have in Python."""

_QUOTED = r"""(?<!\w)(?P<quote>['"]).*?(?P=quote)"""
_CALL = r"`?\b[\w.]+\([^()]*\)`?"
_NAME = rf"(?:{'|'.join(OPTIONS)})"
_VALUE = r"""(?:'[^']*'|"[^"]*"|[\w.+-]*\w)?"""
_ASSIGNED = rf"\b{_NAME}={_VALUE}"
_FOUND = re.compile(
    rf"{_QUOTED}|{_CALL}|(?P<tick>`?)(?P<assigned>{_ASSIGNED}(?:, {_ASSIGNED})*)(?P=tick)|`(?P<name>{_NAME})`"
)


def in_options(message: str) -> str:
    """The message with options of the command where it names arguments; quoted texts and calls stay.

    >>> in_options("raise `n_audits`, or pass n_members=38, n_non_members=19 for 'n_members=1.txt'")
    "raise --audits, or pass --members 38 --non-members 19 for 'n_members=1.txt'"
    >>> in_options("pass `allow_shift=True` or `max_length=`")
    'pass --allow-shift or --max-length'
    """
    return _FOUND.sub(_in_options, message)


def _in_options(found: re.Match[str]) -> str:
    if found["name"]:
        return OPTIONS[found["name"]]
    if found["assigned"]:
        return " ".join(_option(*pair.split("=", 1)) for pair in found["assigned"].split(", "))
    return found[0]


def _option(name: str, value: str) -> str:
    value = value.strip("'\"")
    return OPTIONS[name] if value in ("", "True") else f"{OPTIONS[name]} {value}"
