"""A complete audited fine-tune on real text, without a network: `ezmia demo`, and what it is made of.

May import everything; only `cli` imports it, inside a function.
"""

from ezmia_callbacks.demo.base_model import BaseModelRecipe, train_base_model
from ezmia_callbacks.demo.corpus import package_docstrings

__all__ = ["BaseModelRecipe", "package_docstrings", "train_base_model"]
