"""Measure membership leakage while a language model is fine-tuned, and stop before it remembers too much.

`PrivacyAuditCallback` is the one for the Hugging Face Trainer, `LightningPrivacyAuditCallback` the one for
Lightning. They and `PrivacyAuditor` load on first use, so that importing this package imports neither
torch nor a training framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ezmia_callbacks.canaries import CanarySet, hold_out_canaries, insert_canaries
from ezmia_callbacks.functional.budget import Decision, LeakageBudget
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.result import AuditResult

if TYPE_CHECKING:
    from ezmia_callbacks.audit.auditor import PrivacyAuditor
    from ezmia_callbacks.huggingface import PrivacyAuditCallback
    from ezmia_callbacks.lightning import PrivacyAuditCallback as LightningPrivacyAuditCallback

__version__ = "0.1.0"

__all__ = [
    "AuditHistory",
    "AuditResult",
    "CanarySet",
    "Decision",
    "LeakageBudget",
    "LightningPrivacyAuditCallback",
    "PrivacyAuditCallback",
    "PrivacyAuditor",
    "hold_out_canaries",
    "insert_canaries",
]

# Public name: the module that has it, and its name there.
_LAZY = {
    "LightningPrivacyAuditCallback": ("ezmia_callbacks.lightning", "PrivacyAuditCallback"),
    "PrivacyAuditCallback": ("ezmia_callbacks.huggingface", "PrivacyAuditCallback"),
    "PrivacyAuditor": ("ezmia_callbacks.audit.auditor", "PrivacyAuditor"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, own_name = _LAZY[name]
        return getattr(import_module(module), own_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
