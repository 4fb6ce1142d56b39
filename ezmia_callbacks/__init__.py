"""Measure membership leakage while a language model is fine-tuned, and stop before it remembers too much.

`PrivacyAuditCallback` is the one for the Hugging Face Trainer. It and `PrivacyAuditor` load on first use, so
that importing this package imports neither torch nor a training framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ezmia_callbacks.canaries import CanarySet, hold_out_canaries
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.history import AuditHistory
from ezmia_callbacks.results import AuditResult

if TYPE_CHECKING:
    from ezmia_callbacks.auditor import PrivacyAuditor
    from ezmia_callbacks.huggingface import PrivacyAuditCallback

__version__ = "0.1.0.dev0"

__all__ = [
    "AuditHistory",
    "AuditResult",
    "CanarySet",
    "Decision",
    "LeakageBudget",
    "PrivacyAuditCallback",
    "PrivacyAuditor",
    "hold_out_canaries",
]

_LAZY = {
    "PrivacyAuditCallback": "ezmia_callbacks.huggingface",
    "PrivacyAuditor": "ezmia_callbacks.auditor",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
