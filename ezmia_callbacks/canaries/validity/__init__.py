"""Whether canaries can carry a measurement: sides alike without the model, no near copies, records.

May import `canaries` and what that may. The public names are in `ezmia_callbacks.canaries`.
"""

__all__: list[str] = []
