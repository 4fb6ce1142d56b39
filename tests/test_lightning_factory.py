"""The callback that an environment variable adds to every Lightning trainer, found as Lightning finds it."""

import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from lightning import pytorch as pl
from lightning_tiny import TinyModule, draw, make_loader, make_trainer, validation_loader

from ezmia_callbacks import LeakageBudget, LightningPrivacyAuditCallback
from ezmia_callbacks.errors import ConfigurationError

# Lightning itself calls what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
VARIABLE = "EZMIA_LIGHTNING_MAX_AUC"
PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")


@pytest.fixture(autouse=True)
def installed(monkeypatch, tmp_path):
    """This checkout's entry points, whichever are those of the version that is installed."""
    entries = PROJECT.replace('"', "")
    declared = re.findall(r"^\[project\.entry-points\.([\w.]+)\]\n((?:.+\n)+)", entries, re.MULTILINE)
    about = tmp_path / "site" / "ezmia_callbacks-9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ezmia-callbacks\nVersion: 9\n")
    (about / "entry_points.txt").write_text("".join(f"[{group}]\n{rows}" for group, rows in declared))
    monkeypatch.syspath_prepend(about.parent)


def audits_of(trainer):
    return [found for found in trainer.callbacks if isinstance(found, LightningPrivacyAuditCallback)]


@pytest.mark.parametrize("value", [None, "", " "])
def test_without_the_variable_no_trainer_is_audited(monkeypatch, tmp_path, value):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)

    assert audits_of(make_trainer(tmp_path)) == []


def test_without_the_variable_neither_torch_nor_lightning_is_loaded():
    names = ("torch", "lightning", "pytorch_lightning")
    script = (
        "import sys\nfrom ezmia_callbacks.lightning_factory import callbacks\n"
        f"print(callbacks(), [name for name in {names} if name in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )

    assert done.stdout == "[] []\n"


@pytest.mark.parametrize(
    "package",
    [
        "lightning.pytorch",
        pytest.param(
            "pytorch_lightning",
            marks=pytest.mark.skipif(
                version("pytorch-lightning").startswith("2.4."),
                reason="insists on its own class, and this process has loaded the other package first",
            ),
        ),
    ],
)
def test_each_trainer_gets_a_callback_of_its_own(monkeypatch, tmp_path, package):
    monkeypatch.setenv(VARIABLE, "0.60")
    trainers = [make_trainer(tmp_path, package=import_module(package)) for _ in range(2)]

    (first,), (second,) = map(audits_of, trainers)

    assert first is not second
    assert first.settings.budget == second.settings.budget == LeakageBudget(metric="auc", limit=0.60)


def test_a_run_is_stopped_at_the_limit_that_the_variable_names(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "0.60")
    trainer = make_trainer(tmp_path, max_epochs=12, num_sanity_val_steps=1)

    trainer.fit(TinyModule(), make_loader(draw()[0], is_shuffled=True), validation_loader())

    (audit,) = audits_of(trainer)
    assert audit.history[-1].decision.stop
    assert trainer.current_epoch < 12
    assert (tmp_path / "_privacy_audit/history.jsonl").is_file()


@pytest.mark.parametrize("value", ["none", "NONE"])
def test_a_run_is_only_measured_where_it_says_none(monkeypatch, tmp_path, value):
    monkeypatch.setenv(VARIABLE, value)

    (audit,) = audits_of(make_trainer(tmp_path))

    assert audit.settings.budget is None


@pytest.mark.parametrize("value", ["yes", "0.5", "60", "nan"])
def test_any_other_value_is_refused_by_the_name_of_the_variable(monkeypatch, tmp_path, value):
    monkeypatch.setenv(VARIABLE, value)

    with pytest.raises(ConfigurationError, match=rf"^{VARIABLE}={value}: .*as in 0\.60; or `none`"):
        pl.Trainer(default_root_dir=tmp_path, accelerator="cpu")


def test_a_script_with_a_callback_of_its_own_is_told_that_there_are_two(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "none")

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `PrivacyAuditCallback`"):
        make_trainer(tmp_path, [LightningPrivacyAuditCallback()])
