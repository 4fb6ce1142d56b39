"""Every shell does the same with one training: equal figures to the last bit, stop, resume, two at once."""

import pytest
import torch
from contract_shells import SHELLS

from ezmia_callbacks import LeakageBudget

BUDGET = LeakageBudget(limit=0.75, rule="point")
OTHERS = sorted(SHELLS.keys() - {"pytorch"})

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`:UserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*is not empty.*:UserWarning",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
)


def figures(history):
    """All that an audit says, but for the time it took."""
    # Which weights it saw is told by the names of the tensors, and Lightning gives them others.
    left_out = dict.fromkeys(("seconds", "overhead", "weights"))
    return [{**row, **left_out} for row in history.to_dicts()]


def assert_same(found, expected):
    assert [figures(h) for h in found.histories] == [figures(h) for h in expected.histories]
    assert found.weights.keys() == expected.weights.keys()
    assert [k for k in expected.weights if not torch.equal(found.weights[k], expected.weights[k])] == []


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return SHELLS["pytorch"](tmp_path_factory.mktemp("measured"), [None], n_epochs=3)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return SHELLS["pytorch"](tmp_path_factory.mktemp("stopped"), [BUDGET], n_epochs=8)


@pytest.mark.parametrize("shell", OTHERS)
def test_every_figure_is_the_same_to_the_last_bit(shell, measured, tmp_path):
    assert_same(SHELLS[shell](tmp_path, [None], n_epochs=3), measured)


def test_the_training_leaks(stopped):
    values = [result.metrics["auc"].value for result in stopped.histories[0]]
    assert values[0] == 0.5
    assert values[-1] > 0.75


@pytest.mark.parametrize("shell", OTHERS)
def test_the_run_stops_at_the_same_epoch_with_the_same_weights(shell, stopped, tmp_path):
    (history,) = stopped.histories
    assert 1 < history.stopped.epoch < 8
    assert_same(SHELLS[shell](tmp_path, [BUDGET], n_epochs=8), stopped)


@pytest.mark.usefixtures("checkpoints_of_old_releases")
@pytest.mark.parametrize("shell", SHELLS)
def test_an_interrupted_run_ends_like_one_that_was_not(shell, stopped, tmp_path):
    assert_same(SHELLS[shell](tmp_path, [BUDGET], n_epochs=8, interrupt_after=1), stopped)


@pytest.mark.parametrize("shell", SHELLS)
def test_two_at_once_see_what_each_sees_alone(shell, stopped, tmp_path):
    both = SHELLS[shell](tmp_path, [None, BUDGET], n_epochs=8)

    watching, judging = both.histories
    assert figures(judging) == figures(stopped.histories[0])
    # The bands differ with the audits of the plan, the rest does not.
    assert [r.metrics["auc"].value for r in watching] == [r.metrics["auc"].value for r in judging]
    assert not any(r.decision.stop for r in watching)
    assert [k for k in stopped.weights if not torch.equal(both.weights[k], stopped.weights[k])] == []


@pytest.mark.parametrize("shell", SHELLS)
def test_the_history_says_which_weights_the_model_was_left_with(shell, tmp_path):
    both = SHELLS[shell](tmp_path, [None, BUDGET], n_epochs=8)

    watching, judging = both.histories
    assert judging.stopped is judging[-1]
    assert judging.final_audit is judging.last_within_budget
    # The other audit has put nothing back, and sees what was.
    assert watching.final_audit is watching[len(judging) - 2]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_run_that_is_not_stopped_is_left_with_the_weights_of_its_last_audit(shell, tmp_path):
    (history,) = SHELLS[shell](tmp_path, [None], n_epochs=3).histories

    assert history.final_audit is history[-1]
