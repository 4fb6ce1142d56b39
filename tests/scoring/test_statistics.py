from dataclasses import replace

import numpy as np
import pytest

from ezmia_callbacks.errors import ConfigurationError, ReferenceMismatchError
from ezmia_callbacks.functional import (
    TokenMoments,
    calibrated_min_k_plus_plus_score,
    ez_score,
    loss_difference_score,
    loss_score,
    margin_score,
    min_k_plus_plus_score,
    min_k_score,
    ratio_score,
    wbc_score,
    zlib_score,
)
from ezmia_callbacks.scoring.statistics import (
    SCORES,
    TokenStatistics,
    arrays_of,
    check_numbers,
    join_statistics,
    load_statistics,
    save_statistics,
    score_records,
    statistics_of,
)

LENGTHS = (5, 2, 9, 3)
N_BYTES = np.array([31, 12, 57, 20])


def make_statistics(*, seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    n_tokens = sum(lengths)
    return TokenStatistics(
        log_probs=-rng.gamma(1.0, size=n_tokens).astype(np.float32),
        is_correct=rng.random(n_tokens) < 0.4,
        means=-rng.gamma(2.0, size=n_tokens).astype(np.float32),
        standard_deviations=rng.gamma(1.0, size=n_tokens).astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def make_pairs(*, seed=0, lengths=LENGTHS):
    """Chosen sides, and rejected ones of other lengths."""
    rejected = make_statistics(seed=seed + 100, lengths=[n + 1 for n in lengths])
    return replace(make_statistics(seed=seed, lengths=lengths), rejected=rejected)


def assert_same(actual, expected):
    found = arrays_of(actual)
    assert list(found) == list(arrays_of(expected))
    for name, array in arrays_of(expected).items():
        assert (name, found[name].dtype, found[name].tobytes()) == (name, array.dtype, array.tobytes())


def test_a_token_takes_13_bytes():
    statistics = make_statistics()

    n_bytes = sum(a.nbytes for name, a in arrays_of(statistics).items() if name != "offsets")

    assert n_bytes == 13 * statistics.n_tokens


def test_records_and_tokens_are_counted():
    statistics = make_statistics()

    assert (statistics.n_records, statistics.n_tokens) == (4, 19)


@pytest.mark.parametrize("name", ["log_probs", "is_correct", "means", "standard_deviations"])
def test_an_array_of_another_length_is_refused(name):
    statistics = make_statistics()

    with pytest.raises(ConfigurationError, match=rf"`{name}` has shape \(18,\), `offsets` ends at 19"):
        replace(statistics, **{name: getattr(statistics, name)[:-1]})


def test_saved_statistics_come_back_bit_for_bit(tmp_path):
    odd = np.array([-0.0, -np.inf, np.nan, -1e-45, -3.4e38], dtype=np.float32)
    statistics = make_statistics()
    statistics = replace(statistics, log_probs=np.concatenate([odd, statistics.log_probs[5:]]))

    save_statistics(tmp_path / "run" / "reference", statistics, fingerprint="abc")

    assert_same(load_statistics(tmp_path / "run" / "reference", fingerprint="abc"), statistics)


def test_statistics_of_other_canaries_are_refused(tmp_path):
    save_statistics(tmp_path / "reference", make_statistics(), fingerprint="abc")

    with pytest.raises(
        ReferenceMismatchError,
        match=r"other canaries or another reference \(fingerprint abc, these have def\)",
    ):
        load_statistics(tmp_path / "reference", fingerprint="def")


def test_a_missing_file_says_where_to_resume(tmp_path):
    with pytest.raises(ReferenceMismatchError, match=r"No reference statistics at .*Resume in the folder"):
        load_statistics(tmp_path / "reference", fingerprint="abc")


@pytest.mark.parametrize("n_kept", [0, 4, 8, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, n_kept):
    path = tmp_path / "reference"
    save_statistics(path, make_statistics(), fingerprint="abc")
    path.write_bytes(path.read_bytes()[:n_kept])

    with pytest.raises(ReferenceMismatchError, match=r"cannot be read .* cannot stand in for the reference"):
        load_statistics(path, fingerprint="abc")


def test_a_file_without_our_metadata_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file(arrays_of(make_statistics()), tmp_path / "reference")

    with pytest.raises(ReferenceMismatchError, match="cannot be read"):
        load_statistics(tmp_path / "reference", fingerprint="abc")


def test_no_flipped_bit_of_an_array_goes_unnoticed(tmp_path):
    path = tmp_path / "reference"
    save_statistics(path, make_statistics(lengths=(2, 3)), fingerprint="abc")
    content = path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")

    for at in range(first, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ReferenceMismatchError, match=r"are damaged|cannot be read"):
            load_statistics(path, fingerprint="abc")


def test_a_flipped_bit_of_the_header_is_refused_or_harmless(tmp_path):
    path = tmp_path / "reference"
    statistics = make_statistics(lengths=(2, 3))
    save_statistics(path, statistics, fingerprint="abc")
    content = path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    n_refused = 0

    for at in range(first):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            assert_same(load_statistics(path, fingerprint="abc"), statistics)
        except ReferenceMismatchError:
            n_refused += 1

    # What is left over stands in the file's version number and in padding.
    assert n_refused > 0.98 * first


def expected_scores(name, target, reference):
    """The functional call that each name stands for, written out."""
    offsets = target.offsets
    t, r = target.log_probs, reference.log_probs
    if name == "ez":
        return ez_score(t, r, target.is_correct, reference.is_correct, offsets=offsets)
    if name == "loss_difference":
        return loss_difference_score(t, r, offsets=offsets)
    if name == "wbc":
        return wbc_score(t, r, offsets=offsets)
    if name == "calibrated_min_k_plus_plus":
        moments = [TokenMoments(s.log_probs, s.means, s.standard_deviations) for s in (target, reference)]
        return calibrated_min_k_plus_plus_score(*moments, offsets=offsets)
    if name == "ratio":
        return ratio_score(t, r, offsets=offsets)
    if name == "loss":
        return loss_score(t, offsets=offsets)
    if name == "min_k":
        return min_k_score(t, offsets=offsets)
    if name == "min_k_plus_plus":
        return min_k_plus_plus_score(t, target.means, target.standard_deviations, offsets=offsets)
    if name == "margin":
        return margin_score(
            *(t, r, target.rejected.log_probs, reference.rejected.log_probs),
            chosen_offsets=offsets,
            rejected_offsets=target.rejected.offsets,
        )
    if name == "zlib":
        return zlib_score(t, n_compressed_bytes=N_BYTES, offsets=offsets)
    raise AssertionError(f"no expectation for {name}: add it")


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_the_functional_call_of_its_name(name):
    target, reference = make_pairs(seed=1), make_pairs(seed=2)

    actual = score_records(name, target, reference, n_compressed_bytes=N_BYTES)

    np.testing.assert_array_equal(actual, expected_scores(name, target, reference))
    assert len(set(actual)) > 1


@pytest.mark.parametrize("name", SCORES)
def test_only_calibrated_scores_read_the_reference(name):
    target, references = make_pairs(seed=1), [make_pairs(seed=s) for s in (2, 3)]

    first, second = (score_records(name, target, r, n_compressed_bytes=N_BYTES) for r in references)

    assert np.array_equal(first, second) == (name in {"loss", "min_k", "min_k_plus_plus", "zlib"})


def test_an_unknown_score_lists_the_known_ones():
    statistics = make_statistics()

    with pytest.raises(ConfigurationError, match=r"Unknown score 'lira': use one of ez, .*zlib"):
        score_records("lira", statistics, statistics)


def test_zlib_without_text_is_refused():
    statistics = make_statistics()

    with pytest.raises(ConfigurationError, match="zlib score needs the text"):
        score_records("zlib", statistics, statistics)


def test_the_margin_of_records_without_a_rejected_side_is_refused():
    statistics = make_statistics()

    with pytest.raises(ConfigurationError, match=r"no rejected side: give records with 'chosen' and"):
        score_records("margin", statistics, statistics)


def test_rejected_sides_of_different_tokens_are_refused():
    target = make_pairs()
    other = replace(target, rejected=make_statistics(lengths=(6, 4, 9, 4)))

    with pytest.raises(ConfigurationError, match=r"rejected sides .* different tokens: 4 records with 23"):
        score_records("ez", target, other)


def test_statistics_of_pairs_come_back_bit_for_bit(tmp_path):
    pairs = make_pairs()

    save_statistics(tmp_path / "reference", pairs, fingerprint="abc")

    assert_same(load_statistics(tmp_path / "reference", fingerprint="abc"), pairs)
    assert_same(statistics_of(arrays_of(pairs)), pairs)


def test_no_flipped_bit_of_a_rejected_side_goes_unnoticed(tmp_path):
    path = tmp_path / "reference"
    save_statistics(path, make_pairs(lengths=(2, 3)), fingerprint="abc")
    content = path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")

    for at in range(first, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ReferenceMismatchError, match=r"are damaged|cannot be read"):
            load_statistics(path, fingerprint="abc")


def test_some_pairs_keep_both_of_their_sides():
    pairs, is_chosen = make_pairs(), np.array([True, False, True, False])

    chosen = pairs.select(is_chosen)

    assert_same(chosen.rejected, pairs.rejected.select(is_chosen))
    assert (chosen.n_records, chosen.rejected.offsets.tolist()) == (2, [0, 6, 16])


def test_cut_pairs_are_cut_on_both_sides():
    pairs = make_pairs()

    cut = pairs.cut(np.array([5, 2, 4, 3]), np.array([6, 3, 4, 1]))

    assert cut.offsets.tolist() == [0, 5, 7, 11, 14]
    assert_same(cut.rejected, pairs.rejected.cut(np.array([6, 3, 4, 1])))


def test_records_after_the_chosen_sides_are_the_rejected_ones():
    pairs, plain = make_pairs(), make_statistics()
    together = join_statistics([replace(pairs, rejected=None), pairs.rejected], [range(4), range(4, 8)])

    assert_same(together.split(4), pairs)
    assert plain.split(4) is plain


def test_parts_of_pairs_are_joined_with_their_rejected_sides():
    pairs, is_first = make_pairs(), np.array([True, False, False, True])

    joined = join_statistics([pairs.select(is_first), pairs.select(~is_first)], [[0, 3], [1, 2]])

    assert_same(joined, pairs)


def test_a_pair_needs_both_sides():
    with pytest.raises(ConfigurationError, match="4 chosen sides and 3 rejected ones"):
        replace(make_statistics(), rejected=make_statistics(lengths=(2, 3, 4)))


@pytest.mark.parametrize("side", ["", "rejected_"])
def test_numbers_that_are_none_are_found_on_either_side(side):
    arrays = {name: array.copy() for name, array in arrays_of(make_pairs()).items()}
    check_numbers(statistics_of(arrays))
    arrays[f"{side}means"][3] = np.nan

    with pytest.raises(ConfigurationError, match=f"`{side}means` holds NaN"):
        check_numbers(statistics_of(arrays))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_means": None}, r"`reference\.rejected\.means` is None"),
        ({"rejected_offsets": np.array([0, 5, 3])}, "`offsets` must begin with 0 and never fall"),
        ({"rejected_other": None}, r"it has 'other' in `reference\.rejected`"),
        ({"rejected": {}}, "it has 'rejected' in `reference`, of which"),
        ({"means": 5}, r"`reference\.means` is 5"),
    ],
)
def test_arrays_that_are_no_statistics_of_pairs_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        statistics_of({**arrays_of(make_pairs()), **change}, name="reference")


def test_statistics_of_different_tokens_are_refused():
    target, reference = make_statistics(), make_statistics(lengths=(5, 3, 8, 3))

    with pytest.raises(ConfigurationError, match="different tokens: 4 records with 19 tokens against 4"):
        score_records("ez", target, reference)
