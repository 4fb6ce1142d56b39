"""Windows by which canaries are recognized: alike in NumPy and torch, and of one canary alone."""

import numpy as np
import torch

from ezmia_callbacks.audit.windows import WINDOW, mixed, powers, prefix_sums, window_table
from ezmia_callbacks.scoring.rows import TokenRow


def row(*ids, n_prompt=0):
    ids = np.array(ids, dtype=np.int64)
    labels = ids.copy()
    labels[:n_prompt] = -100
    return TokenRow(ids, labels)


def test_numpy_and_torch_mix_tokens_to_the_same_bits():
    ids = np.random.default_rng(0).integers(0, 250_000, size=(5, 40))
    with np.errstate(over="ignore"):
        expected = mixed(ids)

    np.testing.assert_array_equal(mixed(torch.from_numpy(ids)).numpy(), expected)


def test_a_power_times_its_inverse_is_one():
    forth, back = powers(50)

    with np.errstate(over="ignore"):
        assert (forth * back).tolist() == [1] * 50


def test_a_window_has_the_same_hash_wherever_it_stands():
    ids = np.random.default_rng(0).integers(0, 1000, size=WINDOW)
    hashes = []
    for n_before in (0, 3, 70):
        sums = prefix_sums(np.concatenate([np.arange(n_before), ids]))
        with np.errstate(over="ignore"):
            hashes.append((sums[n_before + WINDOW] - sums[n_before]) * powers(n_before + 1)[1][n_before])
    assert len(set(hashes)) == 1


def test_windows_that_canaries_share_are_not_looked_for():
    template = list(range(100, 112))
    table = window_table([row(*template, *range(10)), row(*template, *range(20, 30))])

    # Those of the template alone are shared; from its last seven tokens on each has its own.
    assert table.n_windows.tolist() == [10, 10]
    assert table.starts.min() == len(template) - WINDOW + 1


def test_a_prompt_is_looked_for_with_its_answer_and_what_comes_after_it_is_not():
    ids = np.arange(30)
    labels = np.where((ids >= 20) & (ids < 22), ids, -100)
    table = window_table([TokenRow(ids, labels)])

    assert sorted(table.starts) == [*range(22 - WINDOW + 1)]


def test_a_window_that_comes_twice_in_a_record_is_not_looked_for():
    table = window_table([row(*range(10), *range(10))])

    assert 0 not in table.starts


def test_a_canary_without_a_window_of_its_own_is_looked_for_as_a_whole_row():
    long = list(range(20))
    table = window_table([row(*long), row(*long[:10]), row(1, 2, 3)])

    assert table.n_windows.tolist() == [10, 0, 0]
    assert sorted(table.row_owners) == [1, 2]


def test_canaries_that_are_equal_are_not_looked_for_at_all():
    table = window_table([row(1, 2, 3), row(1, 2, 3), row(4, 5, 6)])

    assert table.row_owners.tolist() == [2]


def test_long_records_have_a_bounded_number_of_windows_the_first_and_the_last_among_them():
    table = window_table([row(*range(5000))])

    assert table.n_windows.tolist() == [128]
    assert (table.starts.min(), table.starts.max()) == (0, 5000 - WINDOW)
