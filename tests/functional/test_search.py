import pytest
from hypothesis import given
from hypothesis import strategies as st

from ezmia_callbacks.functional.search import smallest_between, smallest_enough


@given(answer=st.integers(1, 3000), fewest=st.integers(1, 3000))
def test_the_smallest_number_that_is_enough_is_found_wherever_the_search_begins(answer, fewest):
    assert smallest_enough(lambda n: n >= answer, fewest=fewest) == max(answer, fewest)


@given(answer=st.integers(-50, 50), below=st.integers(1, 60), above=st.integers(0, 60))
def test_neither_end_of_a_range_is_tried(answer, below, above):
    too_few, enough, tried = answer - below, answer + above, []

    found = smallest_between(lambda n: tried.append(n) or n >= answer, too_few=too_few, enough=enough)

    assert found == answer
    assert all(too_few < n < enough for n in tried)


def test_on_saw_teeth_the_answer_is_enough_and_one_less_is_not():
    def is_enough(n):
        return n in (5, 6, 11, 12) or n >= 20

    found = smallest_enough(is_enough, fewest=1)

    assert is_enough(found)
    assert not is_enough(found - 1)


def test_a_search_can_give_up():
    def is_enough(n):
        if n > 1000:
            raise OverflowError("hopeless")
        return False

    with pytest.raises(OverflowError, match="hopeless"):
        smallest_enough(is_enough, fewest=1)
