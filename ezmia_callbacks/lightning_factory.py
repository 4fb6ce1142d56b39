"""Lightning's callback for every `Trainer` of a process, asked for by an environment variable.

Lightning calls `callbacks` through the entry points `lightning.pytorch.callbacks_factory` and
`pytorch_lightning.callbacks_factory`, in every script where this package is installed. A leaf: nothing in the
package imports this module, and it imports Lightning's callback only once the variable is set.
"""

import os
from typing import Any

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import LeakageBudget

__all__: list[str] = []

_VARIABLE = "EZMIA_LIGHTNING_MAX_AUC"


def callbacks() -> list[Any]:
    """A new `PrivacyAuditCallback` where `EZMIA_LIGHTNING_MAX_AUC` is set; nothing where it is not.

    Its value is the largest tolerated AUC, as in `0.60`, or `none`: then the run is only measured.

    Raises:
        ConfigurationError: if the value is neither.
    """
    value = os.environ.get(_VARIABLE, "").strip()
    if not value:
        return []
    from ezmia_callbacks.lightning import PrivacyAuditCallback

    return [PrivacyAuditCallback(budget=_budget(value))]


def _budget(value: str) -> LeakageBudget | None:
    if value.lower() == "none":
        return None
    try:
        return LeakageBudget(limit=float(value), metric="auc")
    except ValueError as error:
        raise ConfigurationError(
            f"{_VARIABLE}={value}: needed is the largest tolerated AUC, above 0.5 and below 1, as in 0.60; "
            "or `none`, which only measures. Unset the variable to train without an audit."
        ) from error
