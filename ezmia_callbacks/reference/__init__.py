"""What the trained model is compared with: the model before this run trained it.

May import `scoring` and everything below it, and transformers inside functions. Nothing here is public
but `frozen_copy`.
"""

from ezmia_callbacks.reference.sources import frozen_copy

__all__ = ["frozen_copy"]
