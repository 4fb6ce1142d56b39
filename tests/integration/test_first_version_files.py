"""What the first version wrote still loads, goes on and reports; `tests/data/first_version` has it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_tiny import make_trainer
from packaging.version import Version
from tiny import make_model, make_rows, make_texts
from transformers import TrainerState

from ezmia_callbacks import (
    AuditHistory,
    LeakageBudget,
    PrivacyAuditCallback,
    PrivacyAuditor,
    hold_out_canaries,
)
from ezmia_callbacks.errors import AuditError
from ezmia_callbacks.report import render_report, summarize, to_document

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

DATA = Path(__file__).parents[1] / "data" / "first_version"
EXPECTED = json.loads((DATA / "expected.json").read_text())
BUDGET = LeakageBudget(limit=0.9, rule="point")


def draw():
    return hold_out_canaries(make_rows(make_texts(120)), n_members=30, n_non_members=60, seed=0)


def make_auditor(**options):
    return PrivacyAuditor(draw()[1], budget=BUDGET, n_audits=4, score="ez", **options)


def model_after_two_epochs():
    model = make_model()
    model.load_state_dict(torch.load(DATA / "model_after_two_epochs.pt", weights_only=True))
    return model


def auc_of_one_more_epoch(auditor, model):
    rows, _ = draw()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for start in range(0, len(rows), 8):
        ids = torch.tensor([row["input_ids"] for row in rows[start : start + 8]])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return auditor.audit(model, epoch=3).metrics["auc"].value


@pytest.fixture
def run_folder(tmp_path):
    return Path(shutil.copytree(DATA / "run_folder", tmp_path / "run_folder"))


# What nobody counted then is None.
SINCE = (
    "n_members_seen",
    "auc_recent",
    "checkpoint_holder",
    "checkpoint_holder_epsilon",
    "n_checkpoints",
)


def without_later(rows):
    """Audits with the fields that the first version had."""
    assert all(row[name] is None for row in rows for name in SINCE)
    # A single score was judged, which decided by itself.
    assert all((row["decided_by"], row["judged_beside"]) == (row["score"], {}) for row in rows)
    assert all(row["weights"] == "" for row in rows)
    later = (*SINCE, "decided_by", "judged_beside", "weights")
    told = [without_directions({k: v for k, v in row.items() if k not in later}) for row in rows]
    assert all(row["decision"].pop("score") == "" for row in told)
    return told


def without_directions(value):
    """What the first version wrote, which knew one direction alone."""
    if isinstance(value, list):
        return [without_directions(item) for item in value]
    if not isinstance(value, dict):
        return value
    assert not any(value.get(name) for name in ("is_reversed", "reversed"))
    return {k: without_directions(v) for k, v in value.items() if k not in ("is_reversed", "reversed")}


def assert_told(history, expected):
    assert without_later(history.to_dicts()) == expected["results"]
    assert history.caveat == expected["caveat"]
    assert [[f.name, f.is_flagged, f.text] for f in history.findings] == expected["findings"]


def test_a_history_loads_to_the_last_digit(run_folder):
    history = AuditHistory.load(run_folder / "history.jsonl")

    assert_told(history, EXPECTED["run_folder"])
    # The first version did not say.
    assert history.is_complete is None
    assert history.run_metadata.n_planned_audits == 4
    assert (history.run_metadata.n_scored, history.run_metadata.n_canaries) == (90, 90)
    assert history.run_metadata.others == {}


def test_a_loaded_history_is_written_as_it_was(run_folder, tmp_path):
    AuditHistory.load(run_folder / "history.jsonl").save(tmp_path / "again.jsonl")

    before, after = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (run_folder / "history.jsonl", tmp_path / "again.jsonl")
    )
    assert after[0].pop("is_complete") is None
    assert after[0].pop("final_weights") == ""
    assert list(after[0]["facts"].items()) == list(before[0]["facts"].items())
    assert [after[0], *without_later(after[1:])] == before


def test_a_history_is_reported_in_every_form(run_folder):
    history = AuditHistory.load(run_folder / "history.jsonl")

    text, document = summarize(history), to_document(history)
    page = render_report(document)

    figure = f"{EXPECTED['run_folder']['results'][-1]['metrics']['auc']['value']:.3f}"
    assert figure in text
    assert figure in page
    assert document["runs"][0]["outcome"]["kind"] == "within budget"
    assert "interrupted" not in document["runs"][0]["outcome"]["text"]


def test_a_folder_is_resumed_and_its_next_audit_is_the_same(run_folder, caplog):
    auditor, model = make_auditor(output_dir=run_folder), model_after_two_epochs()

    auditor.resume(model, EXPECTED["run_folder"]["results"], step=2)

    assert_told(auditor.history, EXPECTED["run_folder"])
    # Those of a single score, in a file of the first schema.
    assert auditor.trajectories.n_audits == 0
    assert "trajectories.safetensors" in caplog.text
    expected = EXPECTED["run_folder"]["auc_of_one_more_epoch"]
    assert auc_of_one_more_epoch(auditor, model) == pytest.approx(expected, rel=1e-4)


def test_the_kept_weights_of_a_folder_are_restored(run_folder):
    auditor, model = make_auditor(output_dir=run_folder), model_after_two_epochs()
    auditor.resume(model, EXPECTED["run_folder"]["results"], step=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    restored = auditor.restore_within_budget(model)

    assert restored.step == 2
    for name, tensor in model_after_two_epochs().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_weights_kept_by_the_first_version_are_not_restored_for_nothing_says_that_they_are_whole(
    run_folder, caplog
):
    """A pickle without checksums. At a step that no audit of this process has seen."""
    auditor, model = make_auditor(output_dir=run_folder), make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    auditor.resume(model, EXPECTED["run_folder"]["results"], step=3)

    assert "No weights within the budget are kept yet" in caplog.text
    with pytest.raises(AuditError, match="no weights to restore"):
        auditor.restore_within_budget(model)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_state_dict_goes_on_and_its_next_audit_is_the_same():
    auditor, model = make_auditor(), model_after_two_epochs()
    auditor.load_state_dict(torch.load(DATA / "auditor_state.pt", weights_only=True))

    last = auditor.begin(model)

    assert_told(auditor.history, EXPECTED["auditor_state"])
    assert last.step == 2
    expected = EXPECTED["auditor_state"]["auc_of_one_more_epoch"]
    assert auc_of_one_more_epoch(auditor, model) == pytest.approx(expected, rel=1e-4)


def test_a_state_dict_has_the_names_that_it_had():
    state = torch.load(DATA / "auditor_state.pt", weights_only=True)
    auditor = make_auditor()

    auditor.load_state_dict(state)

    assert auditor.state_dict().keys() == {*state, "exposures", "judged_by", "last_audit", "run_id"}
    assert auditor.state_dict()["reference"].keys() == state["reference"].keys()
    later = {"step_scores"}
    assert auditor.state_dict()["trajectories"].keys() - later == state["trajectories"].keys()


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_a_checkpoint_of_trainer_is_resumed_and_ends_with_the_same_curve(tmp_path):
    folder = Path(shutil.copytree(DATA / "trainer", tmp_path / "trainer"))
    (state_file,) = folder.glob("checkpoint-*/trainer_state.json")
    state = json.loads(state_file.read_text())
    # Older releases of transformers do not know every field of newer ones.
    known = {name: value for name, value in state.items() if name in TrainerState.__dataclass_fields__}
    state_file.write_text(json.dumps(known))
    audit = PrivacyAuditCallback(
        draw()[1], budget=BUDGET, score="ez", every="epoch", output_dir=folder / "privacy_audit"
    )
    trainer = make_trainer(
        folder,
        draw()[0],
        [audit],
        save_strategy="epoch",
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )

    trainer.train(resume_from_checkpoint=True)

    assert [result.step for result in audit.history] == [0, 8, 16, 24]
    assert without_later(audit.history.to_dicts()[:2]) == EXPECTED["trainer"]["results"]
    aucs = [result.metrics["auc"].value for result in audit.history]
    # Older releases of transformers feed the rows in another order.
    tolerance = 1e-4 if Version(transformers.__version__) >= Version("5") else 0.02
    assert aucs == pytest.approx(EXPECTED["trainer"]["aucs_of_the_whole_run"], abs=tolerance)
