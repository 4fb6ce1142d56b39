"""Canaries that are made up and put into the training set: their families, their places, their insertion.

May import `canaries` and what that may. The public names are in `ezmia_callbacks.canaries`.
"""

__all__: list[str] = []
