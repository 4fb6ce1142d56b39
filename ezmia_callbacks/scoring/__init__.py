"""A model and records in, token statistics and scores out.

May import `canaries`, `functional` and `distributed`. Names that need no torch are public here.
"""

from ezmia_callbacks.scoring.attack import Attack
from ezmia_callbacks.scoring.rows import EncodedCanaries, TokenRow
from ezmia_callbacks.scoring.statistics import SCORES, TokenStatistics

__all__ = ["SCORES", "Attack", "EncodedCanaries", "TokenRow", "TokenStatistics"]
