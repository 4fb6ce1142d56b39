"""The files of a run belong together: what another run left, or what was edited, is not taken for its own."""

import json
import os
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from huggingface_tiny import make_trainer
from own_loop import draw, run, train_one_epoch
from safetensors.numpy import load_file, save_file
from tiny import make_model

from ezmia_callbacks import (
    AuditHistory,
    LeakageBudget,
    PrivacyAuditCallback,
    PrivacyAuditor,
)
from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.canaries import Provenance, load_canaries, save_canaries
from ezmia_callbacks.errors import AuditError, ConfigurationError, ReferenceMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

BUDGET = LeakageBudget(limit=0.999, rule="point")
SPLIT_BY_THE_USER = Provenance("user_lists", False, None, None, 0, None)


def make_auditor(folder, **options):
    given = {"canaries": draw()[1], "budget": BUDGET, "n_audits": 4, "output_dir": folder, **options}
    return PrivacyAuditor(given.pop("canaries"), **given)


def interrupted(folder, *, order=1, **options):
    """Two epochs of a run that was killed then; runs of one start differ by the order of their rows."""
    auditor = make_auditor(folder, **options)
    model = run(auditor, draw()[0][::order], n_epochs=2)
    state = auditor.state_dict()
    auditor._lock.release()
    return auditor, model, state


def resume(folder, auditor, model, **options):
    later = make_auditor(folder, **options)
    later.resume(
        model,
        auditor.history.to_dicts(),
        step=auditor.history[-1].step,
        exposures=auditor.exposures_of_all.to_dict(),
        judged_by=auditor.history.judged_by,
        run_id=auditor.history.run_metadata.run_id,
    )
    return later


def put(source, target, *names):
    for name in names:
        if (source / name).is_dir():
            shutil.rmtree(target / name)
            shutil.copytree(source / name, target / name)
        else:
            shutil.copyfile(source / name, target / name)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def two_runs(tmp_path):
    """Two runs of the same canaries and the same starting weights."""
    one = interrupted(tmp_path / "one")
    other = interrupted(tmp_path / "other", order=-1)
    return tmp_path / "one", tmp_path / "other", one, other


def test_a_run_has_a_name_that_its_files_carry(two_runs):
    one, _, (auditor, _, state), (other_auditor, _, _) = two_runs
    name = auditor.history.run_metadata.run_id

    assert AuditHistory.load(one / "history.jsonl").run_metadata.run_id == name == state["run_id"]
    assert auditor.trajectories.run_id == name
    assert json.loads((one / "last_within_budget" / "index-0.json").read_text())["run_id"] == name
    # The same canaries and the same reference, and yet another run.
    random, *digests = name.split("-")
    other_random, *other_digests = other_auditor.history.run_metadata.run_id.split("-")
    assert random != other_random
    assert digests == other_digests


def test_a_run_goes_on_under_its_name(two_runs):
    one, _, (auditor, model, _), _ = two_runs

    later = resume(one, auditor, model)

    assert later.history.run_metadata.run_id == auditor.history.run_metadata.run_id
    assert later.trajectories.n_audits == 3
    assert later.restore_within_budget(model).step == 2


def test_another_runs_weights_are_not_put_back(two_runs):
    one, other, (auditor, model, _), _ = two_runs
    put(other, one, "last_within_budget")
    before = bits(model)

    with pytest.raises(AuditError, match=r"weights kept in .* are those of the run .*, not of .*: resume in"):
        resume(one, auditor, model)
    for name, tensor in bits(model).items():
        assert torch.equal(tensor, before[name]), name


def test_another_runs_history_is_refused(two_runs):
    one, other, (auditor, model, _), _ = two_runs
    put(other, one, "history.jsonl")

    with pytest.raises(ReferenceMismatchError, match=r"those of another run .*: pass the `output_dir`"):
        resume(one, auditor, model)


def test_another_runs_history_is_refused_where_a_state_dict_goes_on(two_runs):
    one, other, (_, model, state), _ = two_runs
    put(other, one, "history.jsonl")
    later = make_auditor(one)
    later.load_state_dict(state)

    with pytest.raises(ReferenceMismatchError, match=r"those of another run .*: pass the `output_dir`"):
        later.begin(model)


def test_another_runs_trajectories_are_left_out_and_named(two_runs, caplog):
    one, other, (auditor, model, _), _ = two_runs
    put(other, one, "trajectories.safetensors")

    later = resume(one, auditor, model)

    assert "belong to the run" in caplog.text
    assert later.trajectories.n_audits == 0


def test_another_runs_last_audit_is_left_out(two_runs):
    one, other, (auditor, model, _), _ = two_runs
    put(other, one, "last_audit.safetensors")

    assert resume(one, auditor, model)._state.last_audit is None


def test_the_reference_of_another_start_is_refused(tmp_path):
    """Of the same canaries, and the files around it are those of the run."""
    auditor, model, _ = interrupted(tmp_path / "one")
    with torch.no_grad():
        (start := make_model()).lm_head.weight.mul_(1.5)
    other = make_auditor(tmp_path / "other")
    other.begin(start)
    put(tmp_path / "other", tmp_path / "one", "reference.safetensors")

    with pytest.raises(ReferenceMismatchError, match="The reference is not that of the run"):
        resume(tmp_path / "one", auditor, model)


def test_an_edited_reference_is_refused_though_its_own_digest_fits(tmp_path):
    from ezmia_callbacks.scoring.statistics import load_statistics, save_statistics

    auditor, model, _ = interrupted(tmp_path)
    path, fingerprint = tmp_path / "reference.safetensors", auditor._state.fingerprint
    found = load_statistics(path, fingerprint=fingerprint)
    save_statistics(path, replace(found, log_probs=found.log_probs - 1), fingerprint=fingerprint)

    with pytest.raises(ReferenceMismatchError, match="The reference is not that of the run"):
        resume(tmp_path, auditor, model)


@pytest.mark.parametrize("way", ["resume", "state_dict"])
def test_a_run_does_not_go_on_with_canaries_that_are_said_to_be_drawn_otherwise(tmp_path, way):
    canaries = replace(draw()[1], provenance=SPLIT_BY_THE_USER)
    auditor, model, state = interrupted(tmp_path, canaries=canaries, allow_shift=True)

    go_on = {
        "resume": lambda: resume(tmp_path, auditor, model, canaries=draw()[1]),
        "state_dict": lambda: make_auditor(tmp_path, canaries=draw()[1]).load_state_dict(state),
    }

    with pytest.raises(ReferenceMismatchError, match="another word on how membership was drawn"):
        go_on[way]()


def _say_random(content):
    content["provenance"].update(method="hold_out_coins", is_randomized=True, seed=0, n_pool=120)


@pytest.mark.parametrize(
    "change",
    [
        _say_random,
        lambda content: content["record_ids"].reverse(),
        lambda content: content.update(
            groups=[str(i // 2 * 2 + m) for i, m in enumerate(content["is_member"])]
        ),
    ],
    ids=["random", "ids", "groups"],
)
def test_a_file_of_canaries_that_was_edited_is_refused(tmp_path, change):
    """A word on how the split was drawn would bring the lower bound of epsilon back."""
    path = tmp_path / "canaries.json"
    save_canaries(replace(draw()[1], provenance=SPLIT_BY_THE_USER), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

    with pytest.raises(ConfigurationError, match="was changed since it was saved"):
        load_canaries(path)


def _kept_file(folder):
    (path,) = (folder / "last_within_budget").glob("*.safetensors")
    return path


def _not_finite(path):
    tensors = dict(load_file(path))
    name = min(tensors)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, path)


def _of_another_shape(path):
    tensors = dict(load_file(path))
    name = max(tensors, key=lambda each: tensors[each].ndim)
    tensors[name] = np.ascontiguousarray(tensors[name].T[:, :1])
    save_file(tensors, path)


def _of_another_type(path):
    tensors = dict(load_file(path))
    name = min(tensors)
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, path)


@pytest.mark.parametrize("damage", [_not_finite, _of_another_shape, _of_another_type])
def test_kept_weights_that_are_not_what_was_kept_do_not_reach_the_model(tmp_path, damage):
    auditor, model, _ = interrupted(tmp_path)
    damage(_kept_file(tmp_path))
    before = bits(model)
    # Another process: nothing of it is in memory.
    later = make_auditor(tmp_path)
    later._weights.name(auditor.history.run_metadata.run_id)

    with pytest.raises(AuditError, match=r"(damaged|lack).*first"):
        later._weights.restore(model)
    for name, tensor in bits(model).items():
        assert torch.equal(
            tensor,
            before[name],
        ), name


def test_no_flipped_bit_of_the_kept_weights_reaches_the_model(tmp_path):
    """400 places, drawn with a seed, over the file of weights and the one that describes it."""
    auditor, model, _ = interrupted(tmp_path)
    weights, index = _kept_file(tmp_path), tmp_path / "last_within_budget" / "index-0.json"
    contents = {path: path.read_bytes() for path in (weights, index)}
    expected, rng = bits(model), np.random.default_rng(0)
    outcomes = {"restored": 0, "refused": 0}
    for path in [weights] * 200 + [index] * 200:
        changed = bytearray(contents[path])
        place = int(rng.integers(len(changed)))
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(changed))
        later = KeptWeights(tmp_path / "last_within_budget")
        later.run_id = auditor.history.run_metadata.run_id
        try:
            later.restore(model)
            outcomes["restored"] += 1
        except AuditError:
            outcomes["refused"] += 1
        path.write_bytes(contents[path])
        for name, tensor in bits(model).items():
            assert torch.equal(tensor, expected[name]), (path.name, place, name)

    # What does not matter is no tensor: white space, names of the library's own in the file's head.
    assert outcomes["refused"] > 380


def test_kept_weights_that_no_audit_of_the_run_saw_are_discarded(tmp_path, caplog):
    """Two processes went on from one checkpoint in copies of one folder: the name of the run is the same."""
    auditor, model, state = interrupted(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "fork")
    fork = make_auditor(tmp_path / "fork")
    fork.load_state_dict(state)
    other = make_model()
    other.load_state_dict(model.state_dict())
    fork.begin(other)
    train_one_epoch(other, draw()[0], torch.optim.Adam(other.parameters(), lr=1e-2))
    # Counted as the same step.
    fork.audit(other, step=auditor.history[-1].step)
    fork._weights.wait()
    put(tmp_path / "fork", tmp_path / "one", "last_within_budget")

    later = resume(tmp_path / "one", auditor, model)

    assert "are not known to be within this budget and were discarded" in caplog.text
    assert later.restore_within_budget(model).weights == auditor.history[-1].weights


def test_a_verdict_that_was_edited_does_not_put_weights_over_the_budget_back(tmp_path, caplog):
    auditor, model, _ = interrupted(tmp_path, budget=LeakageBudget(limit=0.6, rule="point", patience=5))
    rows = auditor.history.to_dicts()
    assert [row["decision"]["is_within_budget"] for row in rows] == [True, False, False]
    rows[-1]["decision"].update(is_within_budget=True, message="within budget: AUC 0.550 < 0.600")
    later = make_auditor(tmp_path, budget=LeakageBudget(limit=0.6, rule="point", patience=5))

    later.resume(
        model, rows, step=2, judged_by=auditor.history.judged_by, run_id=auditor.history.run_metadata.run_id
    )

    assert later.history[-1].decision.is_within_budget is False
    assert "The file says 'within budget'" in caplog.text
    assert later.restore_within_budget(model).step == 0


def test_an_audit_says_which_weights_it_saw_and_a_resumed_run_knows_them(tmp_path):
    auditor, model, _ = interrupted(tmp_path)
    seen = [result.weights for result in auditor.history]

    later = resume(tmp_path, auditor, model)

    assert len(set(seen)) == 3
    assert later.audit_of(model).step == auditor.history[-1].step
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert later.audit_of(model) is None


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path, caplog):
    first, second = make_auditor(tmp_path, on_error="warn"), make_auditor(tmp_path)
    model, other = make_model(), make_model()
    first.begin(model)
    second.begin(other)
    written = (tmp_path / "history.jsonl").read_bytes()

    result = first.audit(model)

    assert result.status == "failed"
    assert result.decision.is_within_budget is None
    assert "A later run of this process writes to" in caplog.text
    assert (tmp_path / "history.jsonl").read_bytes() == written


def test_a_run_that_lost_its_folder_does_not_remove_the_weights_of_the_one_that_has_it(tmp_path):
    earlier, later = make_auditor(tmp_path), make_auditor(tmp_path)
    model = run(earlier, draw()[0], n_epochs=1)
    run(later, draw()[0], n_epochs=1)
    later.state_dict()
    kept = sorted(path.name for path in (tmp_path / "last_within_budget").iterdir())

    earlier.finish(model)

    assert sorted(path.name for path in (tmp_path / "last_within_budget").iterdir()) == kept


def test_a_run_that_was_interrupted_in_a_notebook_begins_again_in_its_folder(tmp_path):
    interrupted_cell = make_auditor(tmp_path)
    interrupted_cell.begin(make_model())

    again = make_auditor(tmp_path)
    run(again, draw()[0], n_epochs=1)

    assert [result.status for result in again.history] == ["ok", "ok"]


@pytest.mark.skipif(os.name != "posix", reason="modes of folders are POSIX's")
def test_a_folder_that_was_removed_in_between_is_made_again_for_the_owner_alone_and_locked(tmp_path):
    auditor, model = make_auditor(tmp_path / "run"), make_model()
    auditor.begin(model)
    auditor._weights.wait()
    shutil.rmtree(tmp_path / "run")

    auditor.audit(model)

    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    with pytest.raises(Timeout):
        FileLock(tmp_path / "run" / ".lock", timeout=0).acquire()
    assert len(AuditHistory.load(tmp_path / "run" / "history.jsonl")) == 2


def test_a_folder_that_became_a_file_ends_no_script(tmp_path):
    auditor, model = make_auditor(tmp_path / "run"), make_model()
    auditor.begin(model)
    auditor._weights.wait()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("in the way")

    auditor.finish(model)


def test_a_checkpoint_of_trainer_goes_on_in_its_own_folder_alone(tmp_path):
    rows, canaries = draw()

    def train(name, **options):
        audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
        trainer = make_trainer(
            tmp_path / name, rows, [audit], save_strategy="epoch", num_train_epochs=2, **options
        )
        return trainer

    for name in ("one", "other"):
        train(name, seed=1 if name == "one" else 2).train()
    folder = tmp_path / "one" / "_privacy_audit"
    put(tmp_path / "other" / "_privacy_audit", folder, "history.jsonl", "trajectories.safetensors")
    trainer = train("one")

    with pytest.raises(ReferenceMismatchError, match="those of another run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-8"))


def test_a_checkpoint_whose_note_is_lost_does_not_take_the_history_of_another_run(tmp_path):
    """The folds of one callback: the second writes to a folder that a new process does not know."""
    rows, canaries = draw()

    def fold(callback, **options):
        return make_trainer(tmp_path, rows, [callback], save_strategy="epoch", num_train_epochs=2, **options)

    folds = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    fold(folds, seed=1).train()
    fold(folds, seed=2).train()
    assert (tmp_path / "_privacy_audit_2" / "history.jsonl").is_file()
    trainer = fold(PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch"))

    with pytest.raises(ReferenceMismatchError, match=r"belongs to the run [0-9a-f]{8}, and the files in"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
