import numpy as np
import pytest

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional import Decision, checkpoint_holder, checkpoint_holder_score
from ezmia_callbacks.results import trajectory_blocks
from ezmia_callbacks.results.result import AuditResult
from ezmia_callbacks.results.trajectories import Trajectories
from ezmia_callbacks.results.trajectory_blocks import TrajectoryBlocks

N_RECORDS = 12


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(trajectory_blocks, "N_AUDITS_OF_BLOCK", 4)


def audit(step, status="ok"):
    rng = np.random.default_rng(step)
    decision = Decision(False, None, "no budget")
    scores = {"scores": rng.normal(size=N_RECORDS), "step_scores": rng.normal(size=N_RECORDS)}
    return AuditResult(step, None, status, step == 0, "ez", 6, 6, decision, **scores)


def empty(fingerprint="abc"):
    return Trajectories.empty(
        score_names=["ez"],
        record_ids=[f"row-{i}" for i in range(N_RECORDS)],
        is_member=np.arange(N_RECORDS) < 6,
        fingerprint=fingerprint,
    )


def whole_to(n_audits, **options):
    whole = empty(**options)
    for step in range(n_audits):
        whole = whole.with_result(audit(step))
    return whole


def blocks_to(n_audits, **options):
    blocks = TrajectoryBlocks.of(empty(**options))
    for step in range(n_audits):
        blocks = blocks.with_result(audit(step))
    return blocks


def assert_same(found, expected):
    np.testing.assert_equal(vars(found) | {"sum_of_steps": None}, vars(expected) | {"sum_of_steps": None})


@pytest.mark.parametrize("n_audits", [0, 1, 3, 4, 5, 8, 9])
def test_blocks_hold_what_one_would(n_audits):
    whole = whole_to(n_audits)

    assert_same(blocks_to(n_audits).whole, whole)
    assert_same(TrajectoryBlocks.of(whole).whole, whole)
    assert [b.n_audits for b in TrajectoryBlocks.of(whole).blocks] == [
        b.n_audits for b in blocks_to(n_audits).blocks
    ]


def test_an_audit_more_leaves_the_full_blocks_alone_and_copies_less_than_a_block():
    blocks = blocks_to(9)

    longer = blocks.with_result(audit(9))

    assert longer.blocks[:2] == blocks.blocks[:2]
    assert longer.blocks[2].n_audits == 2
    assert blocks.with_result(audit(9, "failed")) is blocks


def test_some_of_the_records_are_chosen_in_every_block():
    chosen = np.arange(N_RECORDS) % 2 == 0

    assert_same(blocks_to(6).of_records(chosen).whole, whole_to(6).of_records(chosen))


@pytest.mark.parametrize("n_audits", [1, 2, 4, 5, 9])
def test_a_holder_of_all_checkpoints_knows_what_all_steps_say(n_audits):
    step = np.random.default_rng(99).normal(size=N_RECORDS)
    earlier = blocks_to(n_audits).earlier_steps

    found = earlier.score_with(step)

    steps = np.concatenate([whole_to(n_audits).trained().step_scores, step[np.newaxis]])
    assert earlier.n_steps + 1 == len(steps)
    np.testing.assert_allclose(found, checkpoint_holder_score(steps), rtol=1e-12)
    # A run that was resumed has the same to the last bit.
    again = TrajectoryBlocks.of(whole_to(n_audits)).earlier_steps
    np.testing.assert_array_equal(again.score_with(step), found)


def test_the_steps_of_full_blocks_are_ranked_once(monkeypatch):
    n_ranked = []
    rankdata = checkpoint_holder.scipy.stats.rankdata

    def rank(scores, axis):
        n_ranked.append(len(scores))
        return rankdata(scores, axis=axis)

    blocks, counts = TrajectoryBlocks.of(empty()), []
    monkeypatch.setattr(checkpoint_holder.scipy.stats, "rankdata", rank)
    for step in range(40):
        n_ranked.clear()
        if step:
            blocks.earlier_steps.score_with(np.zeros(N_RECORDS))
        blocks = blocks.with_result(audit(step))
        counts.append(sum(n_ranked))

    # At most the block before, once, and what is not full yet.
    assert max(counts[20:]) == max(counts[4:20]) <= 2 * 4


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_block_has_a_file_and_the_first_one_is_read_for_all(tmp_path):
    path = tmp_path / "trajectories.safetensors"

    blocks_to(9).save(path)

    assert names(tmp_path) == [f"trajectories{n}.safetensors" for n in ("-1", "-2", "")]
    assert_same(Trajectories.load(path), whole_to(9))


def test_blocks_that_are_in_their_files_are_not_written_again(tmp_path):
    path = tmp_path / "trajectories.safetensors"
    before = blocks_to(9)
    before.save(path)
    inodes = {p.name: p.stat().st_ino for p in tmp_path.iterdir()}

    before.with_result(audit(9)).save(path, after=before)

    changed = [p.name for p in tmp_path.iterdir() if p.stat().st_ino != inodes[p.name]]
    assert changed == ["trajectories-2.safetensors"]
    assert_same(Trajectories.load(path), whole_to(10))


def test_a_block_whose_file_is_gone_is_written_again(tmp_path):
    path = tmp_path / "trajectories.safetensors"
    before = blocks_to(9)

    before.with_result(audit(9)).save(path, after=before)

    assert_same(Trajectories.load(path), whole_to(10))


@pytest.mark.parametrize("n_audits", [0, 3, 5])
def test_a_shorter_run_leaves_no_block_of_a_longer_one(n_audits, tmp_path):
    path = tmp_path / "trajectories.safetensors"
    longer = blocks_to(14)
    longer.save(path)

    blocks_to(n_audits).save(path, after=longer)

    assert_same(Trajectories.load(path), whole_to(n_audits))


def test_trajectories_that_are_saved_whole_leave_no_block_of_another_run(tmp_path):
    path = tmp_path / "trajectories.safetensors"
    blocks_to(14).save(path)

    whole_to(6).save(path)

    assert names(tmp_path) == ["trajectories.safetensors"]
    assert_same(Trajectories.load(path), whole_to(6))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: whole_to(2, fingerprint="another"), "other records, scores or canaries"),
        (lambda: whole_to(6).of_records(np.arange(N_RECORDS) > 1), "other records, scores or canaries"),
        (lambda: whole_to(2), "steps must not fall"),
    ],
)
def test_files_of_several_runs_are_refused(other, message, tmp_path):
    path = tmp_path / "trajectories.safetensors"
    blocks_to(6).save(path)
    other().write(tmp_path / "trajectories-1.safetensors")

    with pytest.raises(ConfigurationError, match=rf"are not of one run: .*{message}"):
        Trajectories.load(path)


def test_a_damaged_block_is_named(tmp_path):
    path = tmp_path / "trajectories.safetensors"
    blocks_to(6).save(path)
    (tmp_path / "trajectories-1.safetensors").write_bytes(b"damaged")

    with pytest.raises(ConfigurationError, match=r"trajectories-1\.safetensors is not a file of audit"):
        Trajectories.load(path)
