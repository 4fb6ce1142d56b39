import csv
import json

import numpy as np
import pytest

from ezmia_callbacks.array_files import save_arrays
from ezmia_callbacks.canaries import CanarySet
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional import Decision, auc, tpr_at_fpr
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.results.trajectories import (
    ExposedRecord,
    ExposedRecords,
    NearCopy,
    Trajectories,
    drop_list,
    export_exposed,
    leakage_at_any_audit,
    most_exposed,
    rise_between,
)


def audit(scores, *, step, epoch=None, **changes):
    fields = {
        "status": "ok",
        "is_baseline": step == 0,
        "score": "ez",
        "n_members": 3,
        "n_non_members": 10,
        "decision": Decision(False, None, "no budget"),
        "scores": scores,
        "step_scores": None if scores is None else np.full(len(scores), 0.5),
    }
    return AuditResult(step=step, epoch=epoch, **(fields | changes))


def trajectories(*rows, n_members=3, epochs=None):
    """One audit a row, members first, the baseline first: ties only."""
    n = len(rows[0]) if rows else 13
    run = Trajectories.empty(
        score_names=["ez"],
        record_ids=[f"row-{i}" for i in range(n)],
        is_member=np.arange(n) < n_members,
        fingerprint="abc",
    ).with_result(audit(np.full(n, 0.5), step=0, epoch=0.0))
    for i, row in enumerate(rows, start=1):
        epoch = None if epochs is None else epochs[i - 1]
        run = run.with_result(audit(np.asarray(row, dtype=np.float64), step=10 * i, epoch=epoch))
    return run


# Ten non-members with the scores 0 to 9: at an FPR of 0.1, a member must beat all but one of them.
OTHERS = list(range(10))


def test_the_most_exposed_are_ranked_by_how_many_non_members_score_as_high():
    run = trajectories([8.5, 0.5, 9.5, *OTHERS], epochs=[1.0])

    exposed = most_exposed(run)

    assert exposed.records == (
        ExposedRecord("row-2", 9.5, 0.0, first_step=10, first_epoch=1.0, n_audits_above=1),
        ExposedRecord("row-0", 8.5, 0.1, first_step=10, first_epoch=1.0, n_audits_above=1),
    )
    assert (exposed.n_exposed, exposed.n_members, exposed.n_non_members, exposed.step) == (2, 3, 10, 10)


def test_a_tie_with_a_non_member_counts_against_the_attacker():
    exposed = most_exposed(trajectories([9.0, 8.0, 8.1, *OTHERS]))

    assert [(r.record_id, r.share_above) for r in exposed.records] == [("row-0", 0.1), ("row-2", 0.1)]


def test_a_record_counts_from_the_audit_after_which_it_stayed_above():
    run = trajectories(
        [9.5, 9.5, 0.0, *OTHERS], [9.5, 0.0, 9.5, *OTHERS], [9.5, 9.5, 9.5, *OTHERS], epochs=[0.5, None, 1.5]
    )

    first = [(r.record_id, r.first_step, r.first_epoch, r.n_audits_above) for r in most_exposed(run).records]

    assert first == [("row-0", 10, 0.5, 3), ("row-2", 20, None, 2), ("row-1", 30, 1.5, 1)]


def test_the_baseline_is_no_audit_at_which_a_record_leaks():
    above = [9.5, 0.0, 0.0, *OTHERS]
    run = trajectories(above)
    shifted = Trajectories(**{**vars(run), "scores": {"ez": np.array([above, above], dtype=np.float64)}})

    assert most_exposed(shifted).records[0].n_audits_above == 1


def test_only_members_are_exposed_and_at_most_so_many():
    rng = np.random.default_rng(0)
    run = trajectories(rng.normal(size=300), n_members=100)

    exposed = most_exposed(run, n=5, fpr=0.2)

    assert len(exposed.records) == 5
    assert {int(record.record_id.removeprefix("row-")) for record in exposed.records} <= set(range(100))
    assert exposed.n_exposed == 100 * tpr_at_fpr(run.scores["ez"][-1], run.is_member, fpr=0.2)


def test_the_number_that_chance_explains_is_right():
    rng = np.random.default_rng(1)
    found = [
        most_exposed(trajectories(rng.normal(size=80), n_members=50), fpr=0.1).n_exposed for _ in range(800)
    ]

    expected = most_exposed(trajectories(rng.normal(size=80), n_members=50), fpr=0.1).n_expected

    assert expected == pytest.approx(50 * 4 / 31)
    # The plain fpr * n_members, 5, lies outside.
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(800))
    assert abs(np.mean(found) - 5) > 4 * np.std(found) / np.sqrt(800)


def test_the_description_says_how_many_chance_explains():
    text = most_exposed(trajectories([8.5, 0.5, 9.5, *OTHERS])).describe()

    assert text == (
        "At step 10, 2 of 3 members score above all but a fraction 0.1 of 10 non-members; without any "
        "leakage about 0.5 would."
    )


@pytest.mark.parametrize("options", [{"n": 0}, {"fpr": 0.0}, {"fpr": 1.0}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=r"n must be at least 1 and fpr in \(0, 1\)"):
        most_exposed(trajectories([1.0, 2.0, 3.0, *OTHERS]), **options)


def test_a_rate_that_the_set_cannot_resolve_is_refused_with_the_number_needed():
    with pytest.raises(TooFewCanariesError, match=r"FPR 0\.05 needs 20 non-members to be resolved, got 10"):
        most_exposed(trajectories([1.0, 2.0, 3.0, *OTHERS]), fpr=0.05)


@pytest.mark.parametrize("ask", [most_exposed, leakage_at_any_audit])
def test_nothing_is_said_before_the_first_step(ask):
    with pytest.raises(ConfigurationError, match="no audits after the first step yet"):
        ask(trajectories())


def test_failed_audits_leave_no_row():
    run = trajectories([1.0, 2.0, 3.0, *OTHERS])

    assert run.with_result(audit(None, step=20, status="failed")) is run


@pytest.mark.parametrize(
    "changes",
    [{"scores": None}, {"decided_by": "wbc"}, {"scores": np.zeros(12)}],
    ids=["none", "other", "length"],
)
def test_scores_of_something_else_are_refused(changes):
    result = audit(**({"scores": np.zeros(13), "step": 20} | changes))

    with pytest.raises(
        ConfigurationError, match=r"audit at step 20 has scores .* add audits as they are made"
    ):
        trajectories([1.0, 2.0, 3.0, *OTHERS]).with_result(result)


def test_a_resumed_run_keeps_the_audits_up_to_its_checkpoint():
    run = trajectories([1.0, 2.0, 3.0, *OTHERS], [2.0, 2.0, 3.0, *OTHERS])

    assert run.up_to_step(10).steps.tolist() == [0, 10]
    assert run.up_to_step(10).with_result(audit(run.scores["ez"][2], step=15)).steps.tolist() == [0, 10, 15]


def test_trajectories_come_back_from_their_file(tmp_path):
    run = trajectories([1.0, 2.0, 3.0, *OTHERS], epochs=[None])

    run.save(tmp_path / "new" / "trajectories.safetensors")
    actual = Trajectories.load(tmp_path / "new" / "trajectories.safetensors", fingerprint="abc")

    for name, value in vars(run).items():
        np.testing.assert_equal(getattr(actual, name), value)
    assert actual.record_ids == run.record_ids


def test_a_run_without_audits_comes_back_from_its_file(tmp_path):
    run = trajectories().up_to_step(-1)

    run.save(tmp_path / "file")

    assert Trajectories.load(tmp_path / "file").scores["ez"].shape == (0, 13)


def test_trajectories_of_other_canaries_are_refused(tmp_path):
    trajectories().save(tmp_path / "file")

    with pytest.raises(ConfigurationError, match=r"other canaries \(fingerprint abc, these have def\)"):
        Trajectories.load(tmp_path / "file", fingerprint="def")


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "file"
    run = trajectories([1.0, 2.0, 3.0, *OTHERS])
    run.save(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    at_ids = content.index(b"row-7")

    for at in [*range(header, len(content)), at_ids, at_ids + 4]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ConfigurationError, match="not a file of audit trajectories"):
            Trajectories.load(path)


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)

    with pytest.raises(ConfigurationError, match="file is not a file of audit trajectories"):
        Trajectories.load(tmp_path / "file")


def test_a_file_of_another_schema_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("ezmia_callbacks.results.trajectories._SCHEMA", 4)
        trajectories().save(tmp_path / "file")

    with pytest.raises(ConfigurationError, match="its schema is not 3"):
        Trajectories.load(tmp_path / "file")


def test_arrays_that_do_not_belong_together_are_refused():
    run = trajectories([1.0, 2.0, 3.0, *OTHERS])

    with pytest.raises(ConfigurationError, match="The arrays have the shapes"):
        Trajectories(**{**vars(run), "scores": {"ez": run.scores["ez"][:, :-1]}})


@pytest.mark.parametrize("score", ["ez", "wbc"])
def test_scores_that_are_no_numbers_are_refused_whichever_score_they_are_of(score):
    run = of_two_scores()
    scores = {name: each.copy() for name, each in run.scores.items()}
    scores[score][1, 2] = np.nan

    with pytest.raises(ConfigurationError, match="Scores and epochs must be numbers"):
        Trajectories(**{**vars(run), "scores": scores})


@pytest.mark.parametrize("names", [["ez", "ez"], ["ez", 1], ["ez", "gone"], "ez", 5, None, []])
def test_a_file_that_names_other_scores_than_it_holds_is_refused(names, tmp_path):
    run = of_two_scores()
    named = ("steps", "epochs", "is_baseline", "is_member")
    arrays = {name: getattr(run, name) for name in named}
    arrays |= {f"scores of {name}": scores for name, scores in run.scores.items()}
    metadata = {"schema": 2, "record_ids": list(run.record_ids), "fingerprint": "abc", "score_names": names}
    save_arrays(tmp_path / "file", arrays, metadata, digested=("score_names", "record_ids", "fingerprint"))

    with pytest.raises(ConfigurationError, match="is not a file of audit trajectories"):
        Trajectories.load(tmp_path / "file")


def exposed_records():
    return most_exposed(trajectories([8.5, 0.5, 9.5, *OTHERS]))


def test_an_export_holds_ids_and_no_text(tmp_path):
    exposed = exposed_records()

    export_exposed(tmp_path / "exposed.json", exposed)
    export_exposed(tmp_path / "exposed.csv", exposed)

    content = json.loads((tmp_path / "exposed.json").read_text())
    with (tmp_path / "exposed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert content["n_expected"] == exposed.n_expected
    assert [row["record_id"] for row in content["records"]] == ["row-2", "row-0"]
    assert [row["record_id"] for row in rows] == ["row-2", "row-0"]
    assert set(rows[0]) == set(content["records"][0]) == set(vars(exposed.records[0]))


def test_text_is_exported_where_it_is_passed_and_only_that_of_exposed_records(tmp_path):
    texts = {"row-0": 'A "quoted",\nlong note \u2013 1', "row-1": "not exposed"}

    export_exposed(tmp_path / "exposed.json", exposed_records(), texts=texts)
    export_exposed(tmp_path / "exposed.csv", exposed_records(), texts=texts)

    content = (tmp_path / "exposed.json").read_text("utf-8")
    with (tmp_path / "exposed.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in json.loads(content)["records"]] == [None, texts["row-0"]]
    assert [row["text"] for row in rows] == ["", texts["row-0"]]
    assert "not exposed" not in content


def test_an_export_of_another_suffix_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"exposed.txt: the file name must end in .csv or .json"):
        export_exposed(tmp_path / "exposed.txt", exposed_records())


def sentences(n, *, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(f"word{i}" for i in rng.integers(500, size=30)) for _ in range(n)]


def exposed_of(*record_ids):
    records = tuple(ExposedRecord(name, 1.0, 0.0, 10, None, 1) for name in record_ids)
    return ExposedRecords(records, len(records), 1.0, 12, 12, 0.1, "ez", 10)


def test_a_drop_list_names_near_copies_of_exposed_members_but_not_their_own_rows():
    members, others = sentences(12, seed=0), sentences(12, seed=1)
    canaries = CanarySet.from_lists(members, others)
    nearly = " ".join([*members[1].split()[:-1], "other"])
    training = [*sentences(5, seed=2), *members, nearly, members[1].upper(), members[2]]

    actual = drop_list(exposed_of("member-1", "member-3"), canaries=canaries, training_records=iter(training))

    assert actual.record_ids == ("member-1", "member-3")
    assert [(copy.record_id, copy.row) for copy in actual.near_copies] == [("member-1", 17), ("member-1", 18)]
    assert actual.near_copies[1] == NearCopy("member-1", 18, 1.0)


def test_a_drop_list_without_rows_is_the_exposed_members():
    assert drop_list(exposed_of("b", "a")).record_ids == ("b", "a")
    assert drop_list(exposed_of("b", "a")).near_copies == ()


def test_rows_without_canaries_and_records_of_other_canaries_are_refused():
    canaries = CanarySet.from_lists(sentences(12, seed=0), sentences(12, seed=1))

    with pytest.raises(ConfigurationError, match="needs both"):
        drop_list(exposed_of("member-1"), training_records=["a"])
    with pytest.raises(ConfigurationError, match="1 of 2 exposed records are not among the canaries"):
        drop_list(exposed_of("member-1", "group-4"), canaries=canaries, training_records=["a"])


def leaking_run(*, seed=0, n=100, shifts=(0.0, 0.3, 1.5)):
    rng = np.random.default_rng(seed)
    own = rng.normal(size=2 * n)
    is_member = np.arange(2 * n) < n
    return trajectories(*(own + shift * is_member for shift in shifts), n_members=n)


def test_leakage_at_any_audit_is_found_and_its_audit_named():
    run = leaking_run(shifts=(0.0, 1.5, 0.3))

    test = leakage_at_any_audit(run, n_permutations=199)

    assert run.steps[test.audit] == 20
    assert test.largest_auc == auc(run.scores["ez"][2], run.is_member)
    assert test.p_value == 1 / 200
    assert leakage_at_any_audit(leaking_run(shifts=(0.0, 0.0)), n_permutations=199).p_value > 0.05


def test_a_shift_at_the_baseline_is_no_leakage_at_an_audit():
    run = leaking_run(shifts=(0.0,))
    shifted = Trajectories(
        **{**vars(run), "scores": {"ez": np.stack([run.is_member * 1.0, run.scores["ez"][1]])}}
    )

    assert leakage_at_any_audit(shifted, n_permutations=199) == leakage_at_any_audit(run, n_permutations=199)


def test_a_rise_between_two_audits_is_later_minus_earlier():
    run = leaking_run()

    rise = rise_between(run, 10, 30)

    assert rise.difference == auc(run.scores["ez"][3], run.is_member) - auc(
        run.scores["ez"][1], run.is_member
    )
    assert rise.interval.lower > 0
    assert rise_between(run, 30, 10).interval.upper < 0
    assert 0 in rise_between(run, 10, 10).interval


def test_a_step_without_an_audit_is_refused_with_those_that_have_one():
    with pytest.raises(
        ConfigurationError, match=r"no audit at step 15; there are audits at \[0, 10, 20, 30\]"
    ):
        rise_between(leaking_run(), 10, 15)


def test_trajectories_of_groups_tell_of_groups():
    run = trajectories([9.0, 2.0, 5.0, *OTHERS])
    groups = ["ann", "bob", "ann", *(f"other-{i % 5}" for i in range(10))]

    grouped = run.by_group(groups)

    assert grouped.record_ids == ("ann", "bob", *(f"other-{i}" for i in range(5)))
    assert grouped.scores["ez"][1].tolist() == [7.0, 2.0, 2.5, 3.5, 4.5, 5.5, 6.5]
    assert (grouped.n_members, grouped.n_non_members) == (2, 5)
    assert [record.record_id for record in most_exposed(grouped, fpr=0.2).records] == ["ann"]
    assert leakage_at_any_audit(grouped, n_permutations=19).p_value >= 0.05


def test_trajectories_of_some_records_tell_of_these_alone():
    run = trajectories([9.5, 2.0, 8.5, *OTHERS])

    chosen = run.of_records(np.array(run.record_ids) != "row-0")

    assert chosen.scores["ez"].shape == (2, 12)
    assert (chosen.n_members, chosen.n_non_members) == (2, 10)
    assert [record.record_id for record in most_exposed(chosen).records] == ["row-2"]


def of_two_scores():
    """EZ sees nothing, WBC tells all members from all others at the last of two audits."""
    is_member = np.arange(13) < 3
    run = Trajectories.empty(
        score_names=["ez", "wbc"],
        record_ids=[f"row-{i}" for i in range(13)],
        is_member=is_member,
        fingerprint="abc",
    )
    mixed = np.random.default_rng(0).permutation(13) * 1.0
    for step, wbc in enumerate([mixed, mixed, is_member * 1.0]):
        ez, name = mixed, "wbc" if step == 2 else "ez"
        first, second = (wbc, ez) if name == "wbc" else (ez, wbc)
        beside = {"ez" if name == "wbc" else "wbc": second}
        run = run.with_result(
            audit(first, step=step, score="strongest", decided_by=name, scores_beside=beside)
        )
    return run


def test_the_score_that_decided_does_not_mix_the_curves_of_several_scores(tmp_path):
    run = of_two_scores()

    run.save(tmp_path / "file")
    read = Trajectories.load(tmp_path / "file")

    assert read.score_names == ("ez", "wbc")
    np.testing.assert_array_equal(read.of_score("ez")[0], read.of_score("ez")[2])
    np.testing.assert_array_equal(read.of_score("wbc")[2], run.is_member * 1.0)


def test_the_exposed_are_those_of_the_strongest_score_unless_one_is_named():
    run = of_two_scores()

    assert (most_exposed(run).score, most_exposed(run).n_exposed) == ("wbc", 3)
    assert most_exposed(run, score="ez").score == "ez"
    assert most_exposed(run, score="ez").n_exposed < 3


def test_leakage_that_one_of_several_scores_sees_is_found():
    run = of_two_scores()

    test = leakage_at_any_audit(run, n_permutations=999)

    assert (test.largest_auc, test.audit) == (1.0, 2)
    assert test.p_value < 0.03


def test_of_several_scores_the_one_to_compare_is_to_be_named():
    run = of_two_scores()

    with pytest.raises(ConfigurationError, match="`score` is needed: the run has those of ez, wbc"):
        rise_between(run, 1, 2)
    with pytest.raises(ConfigurationError, match="no score 'loss'"):
        rise_between(run, 1, 2, score="loss")
    assert rise_between(run, 1, 2, score="ez").difference == 0.0
