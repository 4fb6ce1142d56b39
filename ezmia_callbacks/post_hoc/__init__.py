"""Audits of a finished run, from its saved checkpoints.

May import `audit` and everything below it, and transformers, PEFT and the client of the hub inside functions.
"""

from ezmia_callbacks.post_hoc.audit import audit_checkpoints
from ezmia_callbacks.post_hoc.checkpoints import Checkpoint, find_checkpoints

__all__ = ["Checkpoint", "audit_checkpoints", "find_checkpoints"]
