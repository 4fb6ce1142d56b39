"""The smallest number that is enough, by doubling and halving."""

from collections.abc import Callable

__all__: list[str] = []


def smallest_enough(is_enough: Callable[[int], bool], *, fewest: int) -> int:
    """Smallest number from `fewest` on that is enough; searches without end if none is.

    Args:
        is_enough: False for small numbers, True for large ones; where it changes more than once, the answer
            is one of the changes. It may raise to give up.
        fewest: Number to begin with, >= 1.

    >>> smallest_enough(lambda n: n * n >= 200, fewest=1)
    15
    """
    if is_enough(fewest):
        return fewest
    too_few, enough = fewest, 2 * fewest
    while not is_enough(enough):
        too_few, enough = enough, 2 * enough
    return smallest_between(is_enough, too_few=too_few, enough=enough)


def smallest_between(is_enough: Callable[[int], bool], *, too_few: int, enough: int) -> int:
    """Smallest number that is enough between one that is not and one that is; neither of these is tried.

    Args:
        is_enough: As in `smallest_enough`.
        too_few: A number that is not enough.
        enough: A larger one that is.

    >>> smallest_between(lambda n: n * n >= 200, too_few=0, enough=100)
    15
    """
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle
    return enough
