"""The plugin in a stand-in for Axolotl's plugin interface, which needs a GPU stack to be installed."""

import importlib
import sys
import types

import pytest
from huggingface_tiny import make_trainer
from tiny import make_rows, make_texts

from ezmia_callbacks import LeakageBudget
from ezmia_callbacks.errors import ConfigurationError, MissingDependencyError


@pytest.fixture
def axolotl(monkeypatch):
    """`axolotl.integrations.base` with the interface of release 0.19.0."""

    class BasePlugin:
        def get_input_args(self):
            return None

        def add_callbacks_post_trainer(self, cfg, trainer):
            return []

    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "ezmia_callbacks.axolotl", raising=False)
    yield importlib.import_module("ezmia_callbacks.axolotl")
    sys.modules.pop("ezmia_callbacks.axolotl", None)


def test_a_configuration_file_audits_the_run(axolotl, tmp_path):
    pytest.importorskip("pydantic")
    plugin = axolotl.PrivacyAuditPlugin()
    rows = make_rows(make_texts(60))
    trainer = make_trainer(tmp_path, rows[:40], eval_dataset=rows[40:], num_train_epochs=2)
    settings = {"budget": {"metric": "auc", "limit": 0.99, "rule": "point"}, "every": 0.5}

    for callback in plugin.add_callbacks_post_trainer({"privacy_audit": settings}, trainer):
        trainer.add_callback(callback)
    trainer.train()

    assert callback.settings.budget == LeakageBudget(limit=0.99, rule="point")
    assert len(callback.history.audits_after_baseline) >= 4
    assert any("privacy/auc" in row for row in trainer.state.log_history)


def test_a_configuration_file_has_canaries_held_out(axolotl, tmp_path):
    trainer = make_trainer(tmp_path, make_rows(make_texts(160)), max_steps=1)
    settings = {"canaries": "hold_out"}

    for callback in axolotl.PrivacyAuditPlugin().add_callbacks_post_trainer(
        {"privacy_audit": settings}, trainer
    ):
        trainer.add_callback(callback)
    trainer.train()

    assert len(trainer.train_dataset) == 144
    assert len(callback.history) == 2


def test_without_settings_it_only_measures(axolotl, tmp_path):
    (callback,) = axolotl.PrivacyAuditPlugin().add_callbacks_post_trainer({}, make_trainer(tmp_path, []))

    assert callback.settings.budget is None


@pytest.mark.parametrize("settings", [{"limit": 0.6}, {"budget": {"maximum": 0.6}}, {"every": "hour"}])
def test_a_wrong_name_or_value_is_refused_by_name(axolotl, tmp_path, settings):
    with pytest.raises(ConfigurationError, match=r"limit|maximum|every"):
        axolotl.callback_from_settings(settings, trainer=make_trainer(tmp_path, []))


def test_the_configuration_class_is_found_by_its_name(axolotl):
    module, _, name = axolotl.PrivacyAuditPlugin().get_input_args().rpartition(".")
    described = getattr(importlib.import_module(module), name)

    assert described(privacy_audit={"every": 0.5}).privacy_audit == {"every": 0.5}


def test_without_axolotl_the_error_says_what_to_install():
    with pytest.raises(MissingDependencyError, match="pip install axolotl"):
        importlib.import_module("ezmia_callbacks.axolotl")
