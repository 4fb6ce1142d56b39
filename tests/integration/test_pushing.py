"""What `push_to_hub=True` would upload holds nothing of the audit's; a stand-in of the hub takes it."""

import json
import os
import shutil
import stat
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import lightning_tiny
import numpy as np
import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects
from huggingface_tiny import draw, make_trainer
from lightning import pytorch as pl
from transformers import TrainerCallback

from ezmia_callbacks import LeakageBudget, LightningPrivacyAuditCallback, PrivacyAuditCallback
from ezmia_callbacks.errors import ConfigurationError

pytestmark = [
    pytest.mark.usefixtures("checkpoints_of_old_releases"),
    pytest.mark.filterwarnings(
        "ignore:.*pin_memory.*:UserWarning",
        "ignore:.*does not have many workers.*",
        "ignore:.*isinstance.treespec, LeafSpec.*",
        "ignore:.*in eval mode at the start.*:UserWarning",
    ),
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
    arguments = {"num_train_epochs": 8, **arguments}
    trainer = make_trainer(path, rows, [audit], push_to_hub=True, **arguments)
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


def private_bytes(audit, folder):
    """What only the audit's files hold: ids, scores, reference, weights over the budget; each by a piece."""
    trajectories = audit.auditor.trajectories
    curves = [getattr(trajectories, field.name) for field in fields(trajectories)]
    rejected = next((folder / "over_budget").rglob("model.safetensors")).read_bytes()
    return [
        *(name.encode() for name in trajectories.record_ids),
        *(word.encode() for word in PRIVATE_WORDS),
        *(each[-1].tobytes()[:64] for each in curves if isinstance(each, np.ndarray) and each.ndim == 2),
        *(each.log_probs.tobytes()[:64] for each in (audit.auditor.reference, audit.auditor.target)),
        rejected[-64:],
    ]


@pytest.mark.parametrize("hub_strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_an_upload_is_the_whole_list_of_the_users_files_and_nothing_else(tmp_path, hub, hub_strategy):
    """Every file by its name, as without the audit; and no piece of the audit's own files in any of them."""
    _, canaries = draw()
    arguments = {"hub_strategy": hub_strategy, "save_strategy": "epoch", "learning_rate": 3e-3}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "notes of mine.txt").write_text("mine")
    shutil.copytree(tmp_path / "plain", tmp_path / "audited")
    budget = LeakageBudget(limit=0.8, rule="point")
    audit = PrivacyAuditCallback(canaries, budget=budget, every="epoch", keep_rejected=True)

    train_and_push(tmp_path / "audited", audit, **arguments)
    uploaded, hub.uploaded = hub.uploaded, {}
    # Where the audit stopped, over budget, no checkpoint was written.
    n_epochs = len(audit.history.audits_after_baseline) - 1
    train_and_push(tmp_path / "plain", TrainerCallback(), num_train_epochs=n_epochs, **arguments)

    assert audit.history.stopped is not None
    assert n_epochs > 0
    assert sorted(uploaded) == sorted(hub.uploaded)
    assert {"notes of mine.txt", "model.safetensors", "trainer_state.json"} <= set(uploaded)
    assert ("last-checkpoint/model.safetensors" in uploaded) == (hub_strategy == "checkpoint")
    assert ("checkpoint-8/model.safetensors" in uploaded) == (hub_strategy == "all_checkpoints")
    folder = tmp_path / "audited" / "_privacy_audit"
    pieces = private_bytes(audit, folder)
    assert [name for name, content in uploaded.items() if any(piece in content for piece in pieces)] == []
    # The pieces are found where they are.
    own = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert [piece for piece in pieces if piece not in own] == []


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


def lightning_run(folder, callbacks):
    """What a logger of Lightning uploads that takes checkpoints, and what it writes itself."""
    uploaded = {}

    class Uploading(pl.loggers.CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            saved = {*checkpoint_callback.best_k_models, checkpoint_callback.last_model_path}
            uploaded.update({Path(path).name: Path(path).read_bytes() for path in saved - {""}})

    rows, _ = lightning_tiny.draw()
    trainer = lightning_tiny.make_trainer(
        folder,
        [*callbacks, pl.callbacks.ModelCheckpoint(save_last=True, save_top_k=-1)],
        max_epochs=2,
        logger=Uploading(folder / "logs"),
        enable_checkpointing=True,
    )
    trainer.fit(
        lightning_tiny.TinyModule(), lightning_tiny.make_loader(rows), lightning_tiny.validation_loader()
    )
    logged = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in (folder / "logs").rglob("*")
        if path.is_file()
    }
    return uploaded, logged


def test_loggers_of_lightning_upload_what_they_upload_without_the_audit(tmp_path):
    _, canaries = lightning_tiny.draw()
    budget = LeakageBudget(limit=0.95, rule="point")
    audit = LightningPrivacyAuditCallback(canaries, every="epoch", budget=budget)

    uploaded, logged = lightning_run(tmp_path / "audited", [audit])
    of_plain, logged_by_plain = lightning_run(tmp_path / "plain", [])

    assert len(audit.history) == 3
    assert "last.ckpt" in uploaded
    assert sorted(uploaded) == sorted(of_plain)
    # The audit's settings and its verdict; older loggers write the file anyway.
    assert {Path(name).name for name in {*logged} - {*logged_by_plain}} <= {"hparams.yaml"}
    assert {*logged_by_plain} <= {*logged}
    reference, target = audit.auditor.reference.log_probs, audit.auditor.target.log_probs
    pieces = [
        *(name.encode() for name in audit.auditor.trajectories.record_ids),
        *(each.tobytes()[:64] for each in (reference, target)),
    ]
    assert [
        name for name, content in (uploaded | logged).items() if any(piece in content for piece in pieces)
    ] == []


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_the_files_of_a_run_are_its_owners_alone(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path / "run", rows, [audit], save_strategy="epoch").train()

    folder = tmp_path / "run" / "_privacy_audit"
    names = {path.name for path in folder.iterdir()}
    statistics = {f"{name}.safetensors" for name in ("last_audit", "reference", "trajectories")}
    assert names == {".lock", "checkpoints", "history.jsonl", *statistics}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
