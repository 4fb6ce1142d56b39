"""What the batches say about the canaries, in words."""

from dataclasses import replace

import numpy as np

from ezmia_callbacks.audit.feeding import (
    counted_by,
    describe_never_fed,
    findings_of_feeding,
    scored_otherwise,
    why_not_seen,
)
from ezmia_callbacks.results.exposures import Exposures
from ezmia_callbacks.scoring.rows import EncodedCanaries, TokenRow

IS_MEMBER = np.array([True] * 8 + [False] * 3)


def encoded():
    rows = tuple(TokenRow(np.arange(9) + i, np.arange(9) + i) for i in range(len(IS_MEMBER)))
    return EncodedCanaries(rows, IS_MEMBER, tuple(f"row-{i}" for i in range(len(rows))), 0, None)


def fed(*indices, in_pieces=(), n_batches=5):
    found = Exposures.none(len(IS_MEMBER))
    n_times, share = found.n_times.copy(), found.share.copy()
    n_times[list(indices)] = 1
    share[[*indices, *in_pieces]] = 1.0
    return replace(found, n_times=n_times, share=share, n_batches=n_batches)


ALL_MEMBERS = tuple(range(8))


def names(findings):
    return [finding.name for finding in findings]


def test_a_run_that_feeds_its_members_alone_has_no_findings():
    assert findings_of_feeding(fed(*ALL_MEMBERS), encoded(), epoch=3.0) == ()
    assert why_not_seen(fed(*ALL_MEMBERS), IS_MEMBER) == ""


def test_members_that_are_not_fed_yet_are_missed_once_the_epoch_is_over():
    assert findings_of_feeding(fed(0, 1), encoded(), epoch=0.99) == ()
    assert findings_of_feeding(fed(0, 1), encoded(), epoch=None) == ()
    (finding,) = findings_of_feeding(fed(0, 1), encoded(), epoch=1.0)
    assert finding.text.startswith(
        "6 of 8 members were never fed whole: row-2, row-3, row-4, row-5, row-6 and 1 more."
    )


def test_of_what_is_missing_it_is_said_how_many_were_fed_in_part():
    assert "(of 2 a part): row-2" in describe_never_fed(fed(0, 1, in_pieces=(4, 5)), encoded())
    assert describe_never_fed(fed(*ALL_MEMBERS), encoded()) == ""


def test_non_members_that_were_fed_count_nowhere_whole_or_in_pieces():
    exposures = fed(*ALL_MEMBERS, 9, in_pieces=(10,))

    (finding,) = findings_of_feeding(exposures, encoded(), epoch=2.0)

    assert "2 non-members were fed in training: row-9, row-10." in finding.text
    assert counted_by(exposures, IS_MEMBER).is_counted.tolist() == [True] * 9 + [False] * 2


def test_members_in_pieces_do_not_count():
    assert (
        counted_by(fed(0, in_pieces=(1,)), IS_MEMBER).is_counted.tolist() == [True] + [False] * 7 + [True] * 3
    )


def test_without_batches_nothing_is_known():
    exposures = fed(n_batches=0)

    assert names(findings_of_feeding(exposures, encoded(), epoch=2.0)) == ["batches not seen"]
    assert why_not_seen(exposures, IS_MEMBER) == "no batch was seen"
    broken = replace(exposures, problem="the model is called without token ids")
    assert why_not_seen(broken, IS_MEMBER) == "the model is called without token ids"


def test_of_a_run_whose_batches_were_seen_in_part_nothing_is_known():
    exposures = replace(fed(*ALL_MEMBERS), problem="looking at a batch failed")

    assert why_not_seen(exposures, IS_MEMBER) == "looking at a batch failed"
    assert names(findings_of_feeding(exposures, encoded(), epoch=2.0)) == ["batches not seen"]


def test_without_a_member_nothing_is_known():
    assert why_not_seen(fed(9), IS_MEMBER) == "of 5 batches none held a whole member"


def otherwise(*names, rows=None, **seen):
    settings = {"is_left_padded": False, "is_shifted": False, **seen}
    return scored_otherwise(frozenset(names), rows or encoded(), **settings)


def test_inputs_that_the_audit_lacks_are_named():
    assert otherwise() == ""
    assert "with pixel_values, token_type_ids, and the audit does not" in otherwise(
        "token_type_ids", "pixel_values"
    )


def test_positions_matter_where_they_do_not_begin_at_0():
    assert otherwise("position_ids") == ""
    assert "do not begin at 0" in otherwise("position_ids", is_shifted=True)
    assert "padding on the left" in otherwise(is_left_padded=True)
    assert otherwise("position_ids", is_left_padded=True) == ""


def test_non_members_of_which_a_large_part_was_fed_are_named():
    exposures = fed(*ALL_MEMBERS)
    share = exposures.share.copy()
    share[8:] = 0.49, 0.5, 0.9

    (finding,) = findings_of_feeding(replace(exposures, share=share), encoded(), epoch=2.0)

    assert finding.text.startswith("2 non-members were fed in large part: row-9, row-10. Near copies")


def encoded_pairs():
    found = encoded()
    return replace(found, rows=tuple(replace(row, rejected=row.cut(8)) for row in found.rows))


def test_of_preference_pairs_it_is_said_how_one_side_may_have_been_fed_elsewhere():
    contaminated = findings_of_feeding(fed(*ALL_MEMBERS, in_pieces=(9,)), encoded_pairs(), epoch=1.0)
    plain = findings_of_feeding(fed(*ALL_MEMBERS, in_pieces=(9,)), encoded(), epoch=1.0)

    assert "keep pairs that share an answer together with `group_by`" in contaminated[0].text
    assert "pair" not in plain[0].text
    assert "trained on with another rejected one" in describe_never_fed(fed(0), encoded_pairs())
    assert "rejected" not in describe_never_fed(fed(0), encoded())
