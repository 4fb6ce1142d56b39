"""What the trackers hold on the disk after a run; `make test-trackers` brings along those not installed."""

import csv
import json
import sqlite3
import struct
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import transformers
import yaml
from lightning.pytorch import loggers
from lightning_tiny import TinyModule, make_loader, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import make_model, make_rows, make_texts, make_tokenizer

from ezmia_callbacks import LeakageBudget, hold_out_canaries
from ezmia_callbacks.audit.settings import AuditSettings
from ezmia_callbacks.huggingface import PrivacyAuditCallback
from ezmia_callbacks.lightning import PrivacyAuditCallback as LightningPrivacyAuditCallback
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.shells.trackers import audit_settings, log_settings, log_verdict

BUDGET = LeakageBudget(limit=0.95, rule="point")
# The trackers' own, as they import their databases and servers.
pytestmark = pytest.mark.filterwarnings("ignore")
HEAVY = [name for name in ("mlflow", "trackio", "wandb") if find_spec(name)]


def draw():
    return hold_out_canaries(make_rows(make_texts(120)), n_members=30, n_non_members=60, seed=0)


@pytest.fixture(scope="module")
def offline():
    """No tracker may reach for the network, or write outside its run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DO_NOT_TRACK", "1")
        yield patch


def finish_wandb():
    """Trainer leaves the run open, and the next one would go on with it."""
    if "wandb" in HEAVY:
        import wandb

        wandb.finish()


@pytest.fixture(scope="module")
def trainer_run(offline, tmp_path_factory):
    """Folder and history of a run whose Trainer reported to every tracker at once."""
    path = tmp_path_factory.mktemp("trainer")
    offline.chdir(path)
    offline.setenv("WANDB_DIR", str(path))
    offline.setenv("TRACKIO_DIR", str(path / "trackio"))
    offline.setenv("TENSORBOARD_LOGGING_DIR", str(path / "tensorboard"))
    offline.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}/mlflow.db")
    rows, canaries = draw()
    callback = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    args = transformers.TrainingArguments(
        str(path / "run"),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=4,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=["tensorboard", *HEAVY],
    )
    # Old releases do not read the environment.
    args.logging_dir = str(path / "tensorboard")
    trainer = transformers.Trainer(
        make_model(),
        args,
        train_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(make_tokenizer(), mlm=False),
        callbacks=[callback],
    )
    trainer.train()
    finish_wandb()
    return SimpleNamespace(path=path, history=callback.history, log_history=trainer.state.log_history)


@pytest.fixture(scope="module")
def lightning_run(offline, tmp_path_factory):
    """Folder and history of a run whose Lightning trainer logged to every logger at once."""
    path = tmp_path_factory.mktemp("lightning")
    offline.chdir(path)
    given = [
        loggers.TensorBoardLogger(path, name="tensorboard", version=""),
        loggers.CSVLogger(path, name="csv", version=""),
    ]
    if "mlflow" in HEAVY:
        given.append(loggers.MLFlowLogger(tracking_uri=f"sqlite:///{path}/mlflow.db"))
    if "wandb" in HEAVY:
        given.append(loggers.WandbLogger(save_dir=path, offline=True))
    rows, canaries = draw()
    callback = LightningPrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(path / "run", [callback], max_epochs=2, logger=given)
    trainer.fit(TinyModule(), make_loader(rows))
    finish_wandb()
    return SimpleNamespace(path=path, history=callback.history)


def expected(run, name):
    """(step, value) of a figure at every audit."""
    points = [(result.step, result.to_metrics()) for result in run.history]
    return [(step, pytest.approx(metrics[name], rel=1e-5)) for step, metrics in points if name in metrics]


FIGURES = ("auc", "auc_lower", "auc_upper", "budget", "over_budget", "non_member_loss")


def assert_curves(run, curve):
    """`curve(name)` gives what a tracker holds: every audit's figure, its band and the budget's line.

    The baseline is held against no budget.
    """
    assert len(run.history) == 3
    for name in FIGURES:
        assert curve(name) == expected(run, name), name
    assert [value for _, value in curve("budget")] == [pytest.approx(0.95)] * 2


def assert_settings(settings):
    assert settings["privacy/score"] == "strongest"
    assert settings["privacy/every"] == "epoch"
    assert settings["privacy/budget"] == "stop when AUC exceeds 0.950"
    assert settings["privacy/budget_limit"] == "0.95"


# TensorBoard


def events(path):
    found = EventAccumulator(str(path))
    found.Reload()
    return found


def tensorboard_texts(found, name):
    tensors = found.Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in tensors]


@pytest.mark.parametrize(
    ("kind", "prefix"), [("trainer_run", "train/privacy/"), ("lightning_run", "privacy/")]
)
def test_tensorboard_holds_curves_settings_and_every_verdict(request, kind, prefix):
    run = request.getfixturevalue(kind)

    found = events(run.path / "tensorboard")

    assert_curves(run, lambda name: [(e.step, e.value) for e in found.Scalars(prefix + name)])
    verdicts = [(result.step, result.describe()) for result in run.history]
    assert tensorboard_texts(found, "privacy/verdict") == verdicts
    ((_, table),) = tensorboard_texts(found, "privacy/settings")
    assert "| privacy/budget_limit | 0.95 |" in table.splitlines()
    assert "hp_metric" not in found.Tags()["scalars"]


def test_only_one_tensorboard_file_is_written(trainer_run):
    assert len(list((trainer_run.path / "tensorboard").glob("events*"))) == 1


# Files of the frameworks themselves


def test_log_history_holds_the_curves(trainer_run):
    def curve(name):
        rows = [row for row in trainer_run.log_history if f"privacy/{name}" in row]
        return [(row["step"], row[f"privacy/{name}"]) for row in rows]

    assert_curves(trainer_run, curve)


def test_csv_logger_holds_curves_settings_and_the_last_verdict(lightning_run):
    with (lightning_run.path / "csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))

    assert_curves(
        lightning_run,
        lambda name: [
            (int(row["step"]), float(row[f"privacy/{name}"])) for row in rows if row[f"privacy/{name}"]
        ],
    )
    kept = yaml.safe_load((lightning_run.path / "csv/hparams.yaml").read_text())
    assert_settings(kept)
    assert kept["privacy/verdict"] == lightning_run.history[-1].describe()


# MLflow


@pytest.mark.parametrize("kind", ["trainer_run", "lightning_run"])
def test_mlflow_holds_curves_settings_and_the_last_verdict(request, kind):
    tracking = pytest.importorskip("mlflow.tracking", exc_type=ImportError)
    run = request.getfixturevalue(kind)

    client = tracking.MlflowClient(f"sqlite:///{run.path}/mlflow.db")
    (kept,) = client.search_runs([found.experiment_id for found in client.search_experiments()])

    assert_curves(
        run,
        lambda name: [
            (point.step, point.value)
            for point in client.get_metric_history(kept.info.run_id, f"privacy/{name}")
        ],
    )
    assert_settings(kept.data.params)
    assert kept.data.tags["privacy/verdict"] == run.history[-1].describe()
    assert kept.info.status == "FINISHED"


# Weights & Biases


def leveldb_records(data):
    """Records of a LevelDB log: blocks of 32 KiB, in them pieces of checksum, length, kind and content."""
    position, record = 7, b""  # Weights & Biases' own header comes first.
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_records(path):
    """History rows, configuration and summary of an offline run, as it will be synchronized."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = path.glob("wandb/offline-run-*/*.wandb")
    rows, config, summary = [], {}, {}

    def as_dict(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    for data in leveldb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(as_dict(record.history.item))
        elif kind == "config":
            config |= as_dict(record.config.update)
        elif kind == "run":
            config |= as_dict(record.run.config.update)
        elif kind == "summary":
            summary |= as_dict(record.summary.update)
    return rows, config, summary


@pytest.mark.parametrize(
    ("kind", "prefix", "step"),
    [
        ("trainer_run", "train/privacy/", "train/global_step"),
        ("lightning_run", "privacy/", "trainer/global_step"),
    ],
)
def test_wandb_holds_curves_settings_and_the_last_verdict(request, kind, prefix, step):
    pytest.importorskip("wandb")
    run = request.getfixturevalue(kind)

    rows, config, summary = wandb_records(run.path)

    assert_curves(run, lambda name: [(row[step], row[prefix + name]) for row in rows if prefix + name in row])
    assert_settings(config)
    assert summary["privacy/verdict"] == run.history[-1].describe()


# Trackio


def test_trackio_holds_curves_settings_and_every_verdict(trainer_run):
    pytest.importorskip("trackio")
    (file,) = (trainer_run.path / "trackio").glob("*.db")

    connection = sqlite3.connect(file)
    rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    configs = [json.loads(row) for (row,) in connection.execute("SELECT config FROM configs")]
    connection.close()

    def curve(name):
        return [(row["train/global_step"], row[name]) for row in rows if name in row]

    assert_curves(trainer_run, lambda name: curve(f"train/privacy/{name}"))
    verdicts = [(result.step, result.describe()) for result in trainer_run.history]
    assert curve("privacy/verdict") == verdicts
    assert len(configs) == 1
    assert_settings(configs[0])


# What no real tracker shows


def test_a_tracker_that_fails_is_warned_about_and_the_others_are_served(caplog):
    class Refusing:
        def log_hyperparams(self, params):
            raise ConnectionError("no route")

    class Keeping:
        def log_hyperparams(self, params):
            self.kept = params

    keeping = Keeping()

    log_settings([object(), Refusing(), keeping], {"score": "ez"}, prefix="privacy/")

    assert keeping.kept == {"privacy/score": "ez"}
    assert caplog.messages == ["Refusing did not take the privacy audit's text: no route"]


def test_a_tracker_that_fails_at_every_audit_is_warned_about_once(caplog):
    class Refusing:
        experiment = SimpleNamespace(log_hparams=None)

        def log_hyperparams(self, params):
            raise ConnectionError("no route")

    one, other = Refusing(), Refusing()
    one.experiment.log_hparams = one.log_hyperparams

    for step in (1, 2):
        log_verdict([one, other], "fine", prefix="privacy/", step=step)

    assert caplog.messages == ["Refusing did not take the privacy audit's text: no route"] * 2


def test_a_verdict_for_trackers_without_a_place_for_text_is_passed_over(caplog):
    log_verdict([object(), SimpleNamespace(experiment=object())], "fine", prefix="privacy/", step=1)

    assert caplog.messages == []


def test_long_texts_are_cut_to_what_mlflow_takes():
    class MLflow:
        def log_params(self, params):
            self.params = params

        def set_tag(self, name, value):
            self.tag = name, value

    mlflow = MLflow()
    reporter = SimpleNamespace(_ml_flow=mlflow)

    log_settings([reporter], {"about": "a" * 9000}, prefix="privacy/")
    log_verdict([reporter], "v" * 9000, prefix="privacy/", step=1)

    assert mlflow.params == {"privacy/about": "a" * 250}
    assert mlflow.tag == ("privacy/verdict", "v" * 5000)


def test_settings_name_the_budget_and_leave_out_what_is_not_set():
    metadata = RunMetadata(score="ez", command="x.py", n_planned_audits="unknown")
    history = AuditHistory((), LeakageBudget(0.1, "tpr_at_fpr"), run_metadata=metadata)

    settings = audit_settings(history, AuditSettings(every=0.5))

    assert settings == {
        "score": "ez",
        "audits_planned": "unknown",
        "confidence": "0.95",
        "budget": "stop when the lower bound of TPR at 1 % FPR exceeds 0.100",
        "budget_metric": "tpr_at_fpr_0.01",
        "budget_limit": "0.1",
        "budget_rule": "lower",
        "budget_confidence": "0.95",
        "budget_patience": "0",
        "every": "0.5",
        "restore": "True",
    }
