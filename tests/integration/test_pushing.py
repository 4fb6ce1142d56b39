"""What `push_to_hub=True` would upload holds nothing of the audit's; a stand-in of the hub takes it."""

import json
import os
import stat
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects
from huggingface_tiny import draw, make_trainer

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback
from ezmia_callbacks.errors import ConfigurationError

pytestmark = [
    pytest.mark.usefixtures("checkpoints_of_old_releases"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

BUDGET = LeakageBudget(limit=0.6, rule="point")

# Words of the audit's own records: of single canaries, and of what was found about them.
PRIVATE_WORDS = (
    "n_times",
    "last_step",
    "exposures",
    "record_ids",
    "is_member",
    "auc_by_score",
    "member_edges",
)


class StandInHub:
    """Keeps what would be uploaded, chosen as huggingface_hub chooses it."""

    def __init__(self):
        self.uploaded = {}

    def create_repo(self, repo_name, **options):
        return SimpleNamespace(repo_id=f"someone/{repo_name}")

    def upload_folder(self, *, folder_path, path_in_repo="", ignore_patterns=None, **options):
        folder = Path(folder_path)
        present = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(present, ignore_patterns=ignore_patterns):
            self.uploaded[f"{path_in_repo}/{name}".lstrip("/")] = (folder / name).read_bytes()
        done = Future()
        done.set_result(None)
        return done


@pytest.fixture
def hub(monkeypatch):
    hub, module = StandInHub(), transformers.trainer
    if hasattr(module, "hf_api"):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
    else:
        monkeypatch.setattr(module, "create_repo", hub.create_repo)
        monkeypatch.setattr(module, "upload_folder", hub.upload_folder)
    return hub


def train_and_push(path, audit, **arguments):
    rows, _ = draw()
    trainer = make_trainer(path, rows, [audit], num_train_epochs=8, push_to_hub=True, **arguments)
    trainer.train()
    trainer.save_state()
    trainer.push_to_hub()
    return trainer


def of_the_audit(uploaded, record_ids):
    """What among the files is of the audit's folder, or speaks of single canaries."""
    words = [word.encode() for word in (*PRIVATE_WORDS, *record_ids)]

    def is_private(name):
        speaks = name.endswith("trainer_state.json") and any(word in uploaded[name] for word in words)
        return "privacy_audit" in name or name.endswith((".jsonl", "last_within_budget-0.pt")) or speaks

    return sorted(name for name in uploaded if is_private(name))


@pytest.mark.parametrize("hub_strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_nothing_of_the_audit_is_uploaded(tmp_path, hub, hub_strategy):
    _, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")

    train_and_push(tmp_path / "run", audit, hub_strategy=hub_strategy, save_strategy="epoch")

    assert audit.history.stopped is not None
    assert "model.safetensors" in hub.uploaded
    state = json.loads(hub.uploaded["trainer_state.json"])
    assert any("privacy/auc" in row for row in state["log_history"])
    assert of_the_audit(hub.uploaded, canaries.record_ids) == []


def test_what_is_found_in_an_upload_is_found(tmp_path, hub):
    """The search above finds what is there: the same files, in a folder that is uploaded."""
    _, canaries = draw()
    train_and_push(tmp_path / "run", PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch"))
    (tmp_path / "run" / "_privacy_audit").rename(tmp_path / "run" / "audit")
    hub.uploaded.clear()

    hub.upload_folder(folder_path=tmp_path / "run", ignore_patterns=["_*", "checkpoint-*"])

    assert "audit/history.jsonl" in of_the_audit(hub.uploaded, canaries.record_ids)


@pytest.mark.parametrize("name", ["audit", "checkpoint-audit", "deeper/_audit", "."])
def test_a_folder_that_would_be_uploaded_is_refused_before_the_first_step(tmp_path, hub, name):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, output_dir=tmp_path / "run" / name)
    trainer = make_trainer(tmp_path / "run", rows, [audit], push_to_hub=True)

    with pytest.raises(ConfigurationError, match=r"`push_to_hub` would upload .* begins with an underscore"):
        trainer.train()

    assert trainer.state.global_step == 0
    assert audit.auditor is None


@pytest.mark.parametrize(
    ("name", "is_pushed"), [("run/_mine", True), ("elsewhere", True), ("run/mine", False)]
)
def test_a_folder_that_would_not_be_uploaded_is_taken(tmp_path, hub, name, is_pushed):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, output_dir=tmp_path / name)

    make_trainer(tmp_path / "run", rows, [audit], push_to_hub=is_pushed, max_steps=1).train()

    assert (tmp_path / name / "history.jsonl").is_file()


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_the_files_of_a_run_are_its_owners_alone(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path / "run", rows, [audit], save_strategy="epoch").train()

    folder = tmp_path / "run" / "_privacy_audit"
    names = {path.name for path in folder.iterdir()}
    statistics = {f"{name}.safetensors" for name in ("last_audit", "reference", "trajectories")}
    assert names == {"checkpoints", "history.jsonl", *statistics}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
