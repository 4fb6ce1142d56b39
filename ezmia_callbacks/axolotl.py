"""`PrivacyAuditPlugin`: the Hugging Face callback from an Axolotl configuration file.

A leaf: nothing in the package imports this module. In the YAML, the arguments of `PrivacyAuditCallback` by
their names, the budget's within it:

    plugins:
      - ezmia_callbacks.axolotl.PrivacyAuditPlugin
    privacy_audit:
      budget: {metric: auc, limit: 0.60}
      every: 0.5
"""

from collections.abc import Mapping
from typing import Any

from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.huggingface import PrivacyAuditCallback

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError:
    raise MissingDependencyError("The Axolotl plugin needs axolotl: pip install axolotl") from None

__all__ = ["PrivacyAuditArgs", "PrivacyAuditPlugin"]


class PrivacyAuditArgs(BaseModel):  # type: ignore[misc]  # skipped import
    """What the configuration file may say: keyword arguments of `PrivacyAuditCallback`."""

    privacy_audit: dict[str, Any] | None = None


class PrivacyAuditPlugin(BasePlugin):  # type: ignore[misc]  # skipped import
    """Adds a `PrivacyAuditCallback` to the trainer that Axolotl builds.

    Members are drawn from the training set, non-members from the evaluation set: set `val_set_size` or
    `test_datasets`. With `canaries: hold_out` both are drawn from the training set, at random.
    """

    def get_input_args(self) -> str:
        """Dotted name of the class that describes the plugin's part of the configuration."""
        return f"{__name__}.{PrivacyAuditArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[PrivacyAuditCallback]:
        """The callback, made for this trainer.

        Raises:
            ConfigurationError: if the configuration names an argument that there is not, or a wrong value.
        """
        return [callback_from_settings(cfg.get("privacy_audit") or {}, trainer=trainer)]


def callback_from_settings(settings: Mapping[str, Any], *, trainer: Any) -> PrivacyAuditCallback:
    """A callback from the plain values of a configuration file.

    Raises:
        ConfigurationError: if a name or a value is wrong.
    """
    arguments = dict(settings)
    budget = arguments.pop("budget", None)
    try:
        return PrivacyAuditCallback(
            budget=None if budget is None else LeakageBudget(**budget), trainer=trainer, **arguments
        )
    except TypeError as error:
        raise ConfigurationError(
            f"`privacy_audit` takes the arguments of PrivacyAuditCallback and, under `budget`, those of "
            f"LeakageBudget: {error}."
        ) from error
