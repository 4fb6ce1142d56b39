"""Whether members and non-members can be told apart without the model, or are near copies of each other.

May import `canaries` and what that may. The public names are in `ezmia_callbacks.canaries`.
"""

__all__: list[str] = []
