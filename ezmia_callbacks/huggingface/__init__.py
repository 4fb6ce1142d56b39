"""`PrivacyAuditCallback` for the Hugging Face Trainer and everything built on it, TRL included.

A leaf, and the only place that imports transformers' trainer: it may import `shells` and everything
below, and only `axolotl`, which builds on the same trainer, imports it.
"""

from ezmia_callbacks.huggingface.callback import PrivacyAuditCallback

__all__ = ["PrivacyAuditCallback"]

# The public path, also in pickles and in configuration files that name the class.
PrivacyAuditCallback.__module__ = __name__
