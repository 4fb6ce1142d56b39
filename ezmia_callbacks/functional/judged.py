"""Which scores decide: one that is named, or the strongest of those that an attacker would try."""

__all__: list[str] = []

STRONGEST = "strongest"
"""Name under which several scores are judged together, so that the one that leaks most decides."""

# The bare loss needs no reference, and sees most where the reference had hardly met such text.
_TOGETHER = ("ez", "loss_difference", "wbc", "loss")


def judged_scores(score: str, *, has_pairs: bool = False) -> tuple[str, ...]:
    """Names of the scores that are judged together under a name.

    Args:
        score: `"strongest"`, or the name of one score.
        has_pairs: Whether the canaries are preference pairs, whose two sides training compares.

    >>> judged_scores("strongest")
    ('ez', 'loss_difference', 'wbc', 'loss')
    >>> judged_scores("strongest", has_pairs=True)[-1]
    'margin'
    >>> judged_scores("ez")
    ('ez',)
    """
    if score != STRONGEST:
        return (score,)
    return (*_TOGETHER, "margin") if has_pairs else _TOGETHER
