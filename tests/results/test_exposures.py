"""What was fed, as numbers: added up over processes and interruptions, saved, and cut."""

import json
from dataclasses import replace

import numpy as np

from ezmia_callbacks.results.exposures import (
    Exposures,
    add_exposures,
    cut_exposures,
    truncation,
    whole_again,
)


def exposures(n_times, last_step, share=None, cut_at=None, **others):
    n_times = np.array(n_times)
    return Exposures(
        n_times,
        np.array(last_step),
        np.minimum(n_times, 1.0) if share is None else np.array(share),
        np.full(len(n_times), -1) if cut_at is None else np.array(cut_at),
        **others,
    )


def test_processes_add_up():
    one = exposures([1, 0, 2], [4, -1, 9], n_batches=5, longest_row=30)
    other = exposures([0, 0, 1], [-1, -1, 3], n_batches=4, longest_row=40)

    both = add_exposures([one, other])

    assert both.n_times.tolist() == [1, 0, 3]
    assert both.last_step.tolist() == [4, -1, 9]
    assert (both.n_batches, both.longest_row) == (9, 40)


def test_a_record_in_several_rows_is_seen_in_pieces_and_not_whole():
    found = exposures([0, 0, 1], [-1, -1, 2], share=[1.0, 0.6, 1.0])

    assert found.is_seen.tolist() == [False, False, True]
    assert found.is_seen_in_pieces.tolist() == [True, False, False]
    assert found.is_seen_in_part.tolist() == [True, True, False]


def test_exposures_go_to_json_and_back():
    found = exposures([1, 0], [3, -1], n_batches=2, longest_row=7, cut_to=5, problem="none")

    again = Exposures.from_dict(json.loads(json.dumps(found.to_dict())))

    assert again.to_dict() == found.to_dict()
    assert again.n_times.dtype == found.n_times.dtype


N_TOKENS = np.array([20, 90, 80, 10])
TOLERANCE = np.array([9, 9, 9, 9])


def truncated(*, n_cut, longest_row=64):
    is_cut = np.arange(4) < n_cut
    share, cut_at = np.where(is_cut, 0.5, 0.0), np.where(is_cut, 60, -1)
    return exposures([0] * 4, [-1] * 4, share, cut_at, longest_row=longest_row)


LONG = np.full(4, 90)


def test_records_that_all_end_where_the_longest_row_does_are_truncated():
    assert truncation(truncated(n_cut=3), LONG, tolerance=TOLERANCE) == 64


def test_one_or_two_records_that_end_there_prove_nothing():
    assert truncation(truncated(n_cut=2), LONG, tolerance=TOLERANCE) == 0


def test_records_that_end_at_different_places_are_not_truncated_but_cut_into_blocks():
    found = exposures([0] * 4, [-1] * 4, [0.5] * 4, [60, 60, 60, 20], longest_row=64)

    assert truncation(found, LONG, tolerance=TOLERANCE) == 0


def test_nothing_is_truncated_before_a_longer_record_was_fed():
    found = exposures([1, 0, 0, 0], [1, -1, -1, -1], longest_row=64)

    assert truncation(found, N_TOKENS, tolerance=TOLERANCE) == 0


def test_what_training_cut_counts_as_fed_once_it_is_cut_too():
    found = exposures([1, 0, 0, 0], [1, -1, -1, -1], [1, 0.5, 0, 0], [-1, 60, -1, -1], longest_row=64)

    cut = cut_exposures(found, N_TOKENS, to=64, step=7)

    assert cut.n_times.tolist() == [1, 1, 0, 0]
    assert cut.last_step.tolist() == [1, 7, -1, -1]
    assert cut.cut_to == 64
    assert add_exposures([cut, replace(found, cut_to=0)]).cut_to == 64


def test_of_records_that_were_cut_nothing_is_known_once_they_are_whole_again():
    cut = exposures([2, 3, 0, 0], [4, 5, -1, -1], longest_row=90, cut_to=64)

    whole = whole_again(cut, N_TOKENS)

    assert whole.n_times.tolist() == [2, 0, 0, 0]
    assert whole.last_step.tolist() == [4, -1, -1, -1]
    assert whole.cut_to == 0
