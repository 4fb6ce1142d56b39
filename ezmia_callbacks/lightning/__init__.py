"""`PrivacyAuditCallback` for Lightning, under either of its names: `lightning` and `pytorch_lightning`.

A leaf, and the only place that imports Lightning: it may import `shells` and everything below, and
nobody imports it.
"""

from ezmia_callbacks.lightning.callback import PrivacyAuditCallback

__all__ = ["PrivacyAuditCallback"]

# The public path, also in pickles and in configuration files that name the class.
PrivacyAuditCallback.__module__ = __name__
