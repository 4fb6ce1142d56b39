from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.functional import Decision, Interval, ez_score
from ezmia_callbacks.measuring.figures import measure_auc, measure_scores
from ezmia_callbacks.results.findings import detect
from ezmia_callbacks.results.result import AuditResult, EdgeCounts, Measurement


def auc(value, *, radius=0.05):
    lower, upper = max(0.0, value - radius), min(1.0, value + radius)
    return Measurement(value, Interval(lower, upper, 0.95, "delong"))


def audit(*, ez=0.62, step=100, epoch=2.0, n_members=100, n_non_members=200, **changes):
    """A normal audit of a run that leaks a little."""
    changes.setdefault("auc_by_score", {"loss_difference": auc(0.66), "loss": auc(0.6), "wbc": auc(0.61)})
    result = AuditResult(
        step=step,
        epoch=epoch,
        status="ok",
        is_baseline=False,
        score="ez",
        n_members=n_members,
        n_non_members=n_non_members,
        decision=Decision(False, None, "no budget"),
        metrics={"auc": auc(ez)},
        n_error_tokens=40.0,
        member_edges=EdgeCounts(1, 8, 2),
        non_member_edges=EdgeCounts(0, 9, 3),
    )
    return replace(result, **changes)


def baseline(*, ez=0.5, loss=0.52):
    scores = {"loss_difference": auc(0.5), "loss": auc(loss), "wbc": auc(0.5)}
    return audit(ez=ez, step=0, epoch=0.0, is_baseline=True, auc_by_score=scores)


def failed():
    return audit(status="failed", metrics={}, auc_by_score={}, member_edges=None, error="NaN")


def names(findings):
    return [finding.name for finding in findings]


def only(findings, name):
    assert names(findings) == [name]
    assert findings[0].is_flagged
    return findings[0].text


def test_a_normal_run_flags_nothing():
    run = [baseline(), audit(ez=0.58, epoch=1.0), audit(ez=0.62), failed(), audit(ez=0.6, epoch=3.0)]

    assert [detect(result, run[:i]) for i, result in enumerate(run)] == [()] * 5


def test_a_failed_audit_has_no_findings_and_is_skipped_by_later_ones():
    assert detect(failed(), [baseline()]) == ()
    assert detect(audit(), [failed(), baseline(), failed()]) == ()


@pytest.mark.parametrize("shift", [0.44, 0.56])
def test_a_shift_before_training_is_named_with_its_interval(shift):
    text = only(detect(baseline(loss=shift)), "baseline leakage")

    lower, upper = shift - 0.05, shift + 0.05
    assert f"AUC of loss {shift:.3f} [{lower:.3f}, {upper:.3f}]" in text
    assert "hold_out_canaries" in text


def test_a_reference_that_is_not_the_start_can_leak_at_the_baseline():
    text = only(detect(baseline(ez=0.7)), "baseline leakage")

    assert "AUC of ez 0.700" in text
    assert "of loss" not in text


def test_leakage_after_the_baseline_is_no_baseline_leakage():
    assert detect(audit(ez=0.64), [baseline(loss=0.56)]) == ()


def test_members_without_errors_saturate_ez():
    text = only(detect(audit(member_edges=EdgeCounts(10, 8, 2), n_error_tokens=12.0)), "saturation")

    assert "10 of 100 member records have no wrongly predicted token left (0 of 200 of the" in text
    assert "half of all records have 12 or fewer" in text
    assert detect(audit(member_edges=EdgeCounts(9, 8, 2))) == ()


def test_single_error_tokens_are_low_evidence():
    text = only(detect(audit(member_edges=EdgeCounts(0, 8, 27))), "low evidence")

    assert "30 of 300 records" in text
    assert detect(audit(member_edges=EdgeCounts(0, 8, 26))) == ()


def test_a_median_below_two_error_tokens_is_low_evidence():
    assert names(detect(audit(n_error_tokens=1.5))) == ["low evidence"]
    assert detect(audit(n_error_tokens=2.0)) == ()
    assert detect(audit(n_error_tokens=None)) == ()


def test_non_members_without_a_downward_shift_are_named():
    text = only(detect(audit(non_member_edges=EdgeCounts(0, 100, 3))), "no downward shift")

    assert "100 of 200 non-members" in text
    assert "loss_difference" in text
    assert detect(audit(non_member_edges=EdgeCounts(0, 99, 3))) == ()
    # Where a record is fully memorized only on one side, EZ does what it should.
    assert detect(audit(member_edges=EdgeCounts(0, 100, 3))) == ()


def test_edges_of_ez_do_not_matter_where_another_score_decides():
    edges = EdgeCounts(90, 90, 90)
    result = audit(score="wbc", member_edges=edges, n_error_tokens=0.0, auc_by_score={"ez": auc(0.6)})

    assert detect(result) == ()


def falling(*, ez_then=0.9, ez_now=0.6, difference_then=0.9, difference_now=0.95):
    def scores(value):
        return {"loss_difference": auc(value)}

    peak = audit(ez=ez_then, step=50, auc_by_score=scores(difference_then))
    return audit(ez=ez_now, auc_by_score=scores(difference_now)), [baseline(), peak, failed()]


def test_ez_that_falls_while_memorization_goes_on_is_inverted():
    result, earlier = falling()

    findings = detect(result, earlier)

    assert names(findings) == ["inversion", "disagreement"]
    assert "fell from 0.900 [0.850, 0.950] at step 50 to 0.600 [0.550, 0.650]" in findings[0].text
    assert "loss difference went from 0.900 to 0.950" in findings[0].text


@pytest.mark.parametrize(
    "changes",
    [{"difference_now": 0.6}, {"ez_now": 0.82}, {"ez_then": 0.6, "ez_now": 0.6}],
    ids=["all scores fell", "within the intervals", "no fall"],
)
def test_other_falls_are_not_inversions(changes):
    result, earlier = falling(**changes)

    assert "inversion" not in names(detect(result, earlier))


def test_a_baseline_is_no_peak_to_fall_from():
    result = audit(ez=0.55, auc_by_score={"loss_difference": auc(0.6)})

    assert detect(result, [baseline(ez=0.8)]) == ()


def test_the_highest_score_above_the_deciding_one_is_named():
    scores = {"loss": auc(0.75), "wbc": auc(0.85), "zlib": Measurement(None, note="none")}

    text = only(detect(audit(ez=0.62, auc_by_score=scores)), "disagreement")

    assert "wbc finds more leakage than ez, which decides: AUC 0.850 [0.800, 0.900] against 0.620" in text


def test_overlapping_intervals_are_no_disagreement():
    assert detect(audit(ez=0.62, auc_by_score={"wbc": auc(0.71)})) == ()
    assert names(detect(audit(ez=0.62, auc_by_score={"wbc": auc(0.73)}))) == ["disagreement"]


def test_a_score_that_told_the_sides_apart_before_training_disagrees_with_nothing():
    result = audit(ez=0.62, auc_by_score={"loss": auc(0.8)})

    assert detect(result, [baseline(loss=0.8)]) == ()
    assert names(detect(result, [baseline(loss=0.52)])) == ["disagreement"]


def test_members_that_score_lower_are_named():
    result = audit(ez=0.2, auc_by_score={"loss_difference": auc(0.22)})

    text = only(detect(result), "reversed")

    assert "Members score LOWER than non-members: AUC of ez 0.200 [0.150, 0.250]" in text
    assert "reaches an AUC of 0.800" in text
    assert detect(audit(ez=0.46, auc_by_score={"loss_difference": auc(0.5)})) == ()


def test_a_score_that_leaks_more_in_the_other_direction_disagrees():
    text = only(detect(audit(ez=0.62, auc_by_score={"wbc": auc(0.1)})), "disagreement")

    assert "wbc (reversed) finds more leakage than ez, which decides: AUC 0.900 [0.850, 0.950]" in text


def test_findings_survive_json():
    result = replace(audit(), findings=detect(audit(epoch=0.5)))

    assert AuditResult.from_dict(result.to_dict()) == result


def test_fully_memorized_members_invert_the_released_score_and_are_told():
    """Members lose their error tokens; the released code then scores them 0, as it scores nobody else."""
    rng = np.random.default_rng(0)
    n, length = 200, 30
    is_member = np.arange(n) < n // 2
    offsets = np.arange(n + 1) * length
    reference = rng.normal(-3, 1, n * length).clip(max=-0.1)

    def measured(share_learned):
        is_learned = np.repeat(is_member, length) & (rng.random(n * length) < share_learned)
        target = np.minimum(-0.01, np.where(is_learned, -0.02, reference + rng.normal(0, 0.5, n * length)))
        # What is not learned yet moves up for members, too.
        target = np.minimum(-0.01, target + 0.2 * np.repeat(is_member, length))
        scores = ez_score(
            target, reference, is_learned, np.zeros_like(is_learned), offsets=offsets, mode="paper_code"
        )
        n_errors = np.add.reduceat(~is_learned, offsets[:-1])
        return audit(
            n_members=n // 2,
            n_non_members=n // 2,
            metrics=measure_scores(scores, is_member, fpr_levels=(), confidence=0.95),
            auc_by_score={
                "loss_difference": measure_auc(
                    np.add.reduceat(target - reference, offsets[:-1]), is_member, confidence=0.95
                )
            },
            n_error_tokens=float(np.median(n_errors)),
            member_edges=EdgeCounts(int((n_errors[is_member] == 0).sum()), 0, 0),
            non_member_edges=EdgeCounts(0, 0, 0),
        )

    early, late = measured(0.3), measured(1.0)

    assert early.metrics["auc"].value > 0.8
    assert late.metrics["auc"].value < 0.1
    assert names(detect(late, [baseline(), early])) == ["saturation", "inversion", "reversed"]


def train(model, rows, *, learning_rate, n_epochs=1):
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for start in [*range(0, len(rows), 8)] * n_epochs:
        ids = [torch.tensor(row["input_ids"]) for row in rows[start : start + 8]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        optimizer.zero_grad()
        model(input_ids=padded, attention_mask=(labels >= 0).long(), labels=labels).loss.backward()
        optimizer.step()


def test_a_vocabulary_that_the_base_never_saw_is_ordered_by_the_mean_shift():
    """All wrong tokens move up, on both sides: ordered by their sum, records are ordered by length."""
    rng = np.random.default_rng(2)

    def records(token_ids, n):
        return [{"input_ids": rng.choice(token_ids, size=k).tolist()} for k in rng.integers(8, 61, size=n)]

    # Wide weights remember words in their places within a few epochs.
    model = make_model(n_positions=64, n_embd=64, initializer_range=0.2)
    train(model, records(range(3, 20), 200), learning_rate=1e-3, n_epochs=3)
    rows, canaries = hold_out_canaries(records(range(20, 40), 160), n_members=80, n_non_members=80, seed=0)
    auditor = PrivacyAuditor(canaries, n_audits=1, score="ez")
    auditor.begin(model)
    train(model, rows, learning_rate=5e-3, n_epochs=6)

    result = auditor.audit(model)

    target, reference = auditor.target, auditor.reference
    sums = np.add.reduceat(target.log_probs - reference.log_probs, target.offsets[:-1])
    is_member = auditor.encoded.is_member
    assert measure_auc(sums.astype(np.float64), is_member, confidence=0.95).value < 0.65
    assert result.metrics["auc"].value > 0.85
    assert "no downward shift" in names(result.findings)


def test_a_healthy_run_of_a_real_model_flags_nothing():
    rows, canaries = hold_out_canaries(
        make_rows(make_texts(400, n_words=24)), n_members=60, n_non_members=120, seed=1
    )
    model = make_model()
    # A base that knows the domain: an untrained one only ever moves up.
    train(model, make_rows(make_texts(200, n_words=24, seed=9)), learning_rate=3e-3, n_epochs=2)
    auditor = PrivacyAuditor(canaries, n_audits=3)
    auditor.begin(model)
    for epoch in range(1, 4):
        train(model, rows, learning_rate=1e-3)
        auditor.audit(model, epoch=epoch)

    findings = [detect(result, auditor.history[:i]) for i, result in enumerate(auditor.history)]

    assert findings == [()] * 4


class NotWalked(tuple):
    """Audits that nobody may look through from the first to the last."""

    def __iter__(self):
        raise AssertionError("looks through all audits")


def test_what_told_the_sides_apart_before_training_is_looked_up_at_the_baseline_alone():
    result = audit(score="strongest", decided_by="ez", auc_by_score={"wbc": auc(0.73)})

    found = detect(result, NotWalked([baseline(), audit(), audit()]))

    assert names(found) == ["disagreement"]
