"""Resumed under other settings: audits are judged anew, and what does not belong together is refused."""

import shutil

import contract_shells
import numpy as np
import pytest
import torch
from contract_shells import SHELLS, draw
from tiny import make_model

from ezmia_callbacks import LeakageBudget, PrivacyAuditor
from ezmia_callbacks.errors import AuditError, ConfigurationError, ReferenceMismatchError

pytestmark = [
    pytest.mark.usefixtures("checkpoints_of_old_releases"),
    pytest.mark.filterwarnings(
        "ignore:You defined a `validation_step`:UserWarning",
        "ignore:.*LeafSpec.*:FutureWarning",
        "ignore:.*does not have many workers.*:UserWarning",
        "ignore:.*is not empty.*:UserWarning",
        "ignore:.*pin_memory.*:UserWarning",
        "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
    ),
]

OWN_LOOPS = ("pytorch", "accelerate")
WIDE = LeakageBudget(limit=0.99, rule="point")


@pytest.fixture(scope="module", autouse=True)
def one_score():
    """The limits here fit the figures of EZ."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(contract_shells, "SCORE", "ez")
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The run in one piece, without a budget."""
    outcome = SHELLS["pytorch"](tmp_path_factory.mktemp("measured"), [None], n_epochs=2)
    first, second = outcome.histories[0].results[1:]
    assert 0.57 < first.metrics["auc"].value < 0.6
    assert 0.57 < second.metrics["auc"].value < 0.6
    return outcome


def resume(shell, folder, before, **now):
    return SHELLS[shell](folder, [before], n_epochs=2, interrupt_after=1, **now)


def below(measured, *, rule="point"):
    """A budget that the first epoch is over already, if it is read so."""
    auc = measured.histories[0][1].metrics["auc"]
    top = {"point": auc.value, "upper": auc.band.upper}[rule]
    return LeakageBudget(limit=(top + (0.5 if rule == "point" else auc.value)) / 2, rule=rule)


def assert_nothing_was_restored(outcome, measured, caplog):
    """The run stopped at its next audit, with the weights that it had there, and says what they are."""
    (history,) = outcome.histories
    assert [result.decision.is_within_budget for result in history] == [True, False, False]
    assert [result.decision.stop for result in history] == [False, False, True]
    assert history.last_within_budget.is_baseline
    assert "goes on from weights that are not known to be within its budget (step 12" in caplog.text
    assert "OVER BUDGET" in caplog.text
    assert "Restored the weights" not in caplog.text
    for name, tensor in measured.weights.items():
        assert torch.equal(outcome.weights[name], tensor), name


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("rule", ["point", "upper"])
def test_what_was_inside_a_wider_budget_is_not_put_back_under_a_stricter_one(
    shell, rule, measured, tmp_path, caplog
):
    """Stricter by its limit, or by its rule at nearly the same limit."""
    outcome = resume(shell, tmp_path, WIDE, budget=below(measured, rule=rule))

    assert_nothing_was_restored(outcome, measured, caplog)
    # The callbacks' runs had ended, and what they kept was gone.
    assert ("The weights of step 12, which the interrupted run kept" in caplog.text) == (shell in OWN_LOOPS)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_metric_that_was_measured_is_judged_anew(shell, measured, tmp_path, caplog):
    advantage = measured.histories[0][1].metrics["advantage"].value

    outcome = resume(
        shell, tmp_path, WIDE, budget=LeakageBudget(metric="advantage", limit=advantage / 2, rule="point")
    )

    assert_nothing_was_restored(outcome, measured, caplog)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_metric_that_was_not_measured_leaves_no_verdict(shell, tmp_path, caplog):
    budget = LeakageBudget(metric="tpr_at_fpr", fpr=0.3, limit=0.999, rule="point")

    (history,) = resume(shell, tmp_path, WIDE, budget=budget).histories

    assert [result.decision.is_within_budget for result in history] == [True, None, True]
    assert history[1].decision.message == "not judged under this budget: TPR at 30 % FPR was not measured"
    assert "not judged under this budget: TPR at 30 % FPR was not measured): the next audit" in caplog.text


@pytest.mark.parametrize("shell", SHELLS)
def test_a_run_without_a_budget_is_judged_by_the_one_that_comes(shell, measured, tmp_path, caplog):
    outcome = resume(shell, tmp_path, None, budget=below(measured))

    assert_nothing_was_restored(outcome, measured, caplog)


@pytest.mark.parametrize("shell", SHELLS)
def test_another_score_is_refused_before_the_first_step(shell, tmp_path):
    with pytest.raises(ConfigurationError, match="judged by the score 'ez', and this one would be by 'loss'"):
        resume(shell, tmp_path, WIDE, score="loss")


@pytest.mark.parametrize("shell", SHELLS)
def test_other_canaries_are_refused_before_the_first_step(shell, tmp_path):
    others = draw()[1].select(np.arange(99))

    with pytest.raises(ReferenceMismatchError, match="other canaries"):
        resume(shell, tmp_path, WIDE, canaries=others)


def another_run(folder):
    """A second stage that started anew, from other weights, in the folder of the first."""
    PrivacyAuditor(draw()[1], output_dir=folder).begin(make_model(seed=5))


@pytest.mark.parametrize("shell", SHELLS)
def test_the_folder_of_another_run_is_refused_before_the_first_step(shell, tmp_path):
    with pytest.raises(ReferenceMismatchError, match=r"are those of another run .*: pass the `output_dir`"):
        resume(shell, tmp_path, WIDE, meanwhile=another_run)


@pytest.mark.parametrize("is_stricter", [True, False])
def test_a_plain_history_is_judged_anew_too(measured, tmp_path, is_stricter):
    """`PrivacyAuditor.resume` with rows alone: what judged them is not known."""
    resume("pytorch", tmp_path, WIDE, meanwhile=lambda folder: shutil.copytree(folder, tmp_path / "copy"))
    rows = measured.histories[0].to_dicts()[:2]
    budget = below(measured) if is_stricter else WIDE
    auditor = PrivacyAuditor(draw()[1], budget=budget, n_audits=2, score="ez", output_dir=tmp_path / "copy")

    auditor.resume(make_model(), rows, step=13)

    assert auditor.history[1].decision.is_within_budget is not is_stricter
    if is_stricter:
        with pytest.raises(AuditError, match="no weights to restore"):
            auditor.restore_within_budget(make_model())
    else:
        assert auditor.restore_within_budget(make_model()).step == 12
