"""The real `EarlyStoppingCallback` beside the audit, before or after it: whoever stops, the budget holds."""

import pytest
import transformers
from huggingface_tiny import draw, make_trainer
from packaging.version import Version
from restoring import (
    N_STEPS_IN_EPOCH,
    Witness,
    assert_same_weights,
    checkpoints,
    in_budget_steps,
    make_adapted_model,
)
from tiny import make_model, make_rows, make_texts
from transformers import EarlyStoppingCallback

from ezmia_callbacks import LeakageBudget, PrivacyAuditCallback
from ezmia_callbacks.shells.checkpoint_folders import step_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    # LoRA on random weights that were never saved under a name.
    "ignore:.*Could not find a config file.*:UserWarning",
    # peft reads a name that transformers 5 renamed.
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
)

# Until then early stopping insists on loading the best checkpoint.
STOPS_WITHOUT_BEST = Version(transformers.__version__) >= Version("4.48")
LOADS_BEST = [True, False] if STOPS_WITHOUT_BEST else [True]
SETUPS = [(True, False), (True, True)] + ([(False, False)] if STOPS_WITHOUT_BEST else [])
ORDERS = ["audit first", "early stopping first"]
N_EPOCHS = 12
# Never reached, so that the number of evaluations alone decides when early stopping stops.
NO_IMPROVEMENT_IS_ENOUGH = 1e6


def run(
    path,
    *,
    order,
    stop_after,
    limit=0.65,
    patience=0,
    loads_best=True,
    is_adapted=False,
    every="epoch",
    **options,
):
    """A finished run that early stopping would end after so many evaluations."""
    rows, canaries = draw()
    witness = Witness()
    budget = LeakageBudget(limit=limit, rule="point", patience=patience)
    audit = PrivacyAuditCallback(canaries, budget=budget, every=every, score="ez")
    early = EarlyStoppingCallback(stop_after - 1, early_stopping_threshold=NO_IMPROVEMENT_IS_ENOUGH)
    pair = [audit, early] if order == "audit first" else [early, audit]
    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch" if loads_best else "no",
        "load_best_model_at_end": loads_best,
        "metric_for_best_model": "eval_loss",
        "num_train_epochs": N_EPOCHS,
        "learning_rate": 2e-2 if is_adapted else 5e-3,
        "lr_scheduler_type": "constant",
    }
    trainer = make_trainer(
        path,
        rows,
        [witness, *pair],
        model=make_adapted_model() if is_adapted else make_model(),
        eval_dataset=make_rows(make_texts(20, seed=8)),
        **settings | options,
    )
    trainer.train()
    return trainer, audit, witness


def assert_inside_budget(path, trainer, audit, witness):
    """The model is one that an audit found inside the budget, and so is all that was ever saved."""
    good = in_budget_steps(audit.history)
    best = step_of(trainer.state.best_model_checkpoint)
    assert set(witness.saved) <= set(good)
    assert set(checkpoints(path)) <= set(good)
    assert best is None or best in good
    is_best_loaded = trainer.args.load_best_model_at_end and best is not None
    kept = best if is_best_loaded else audit.history.last_within_budget.step
    assert_same_weights(trainer.model, witness.weights[kept])
    assert not list(path.rglob("last_within_budget*"))
    return kept


@pytest.fixture(scope="module")
def epoch_over(tmp_path_factory):
    """The first epoch over budget, which is the same in every run."""
    _, audit, _ = run(tmp_path_factory.mktemp("over"), order=ORDERS[0], stop_after=100)
    epoch = audit.history.stopped.step // N_STEPS_IN_EPOCH
    assert 2 < epoch < N_EPOCHS
    return epoch


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("loads_best", "is_adapted"), SETUPS)
def test_early_stopping_that_comes_first_ends_a_run_inside_its_budget(
    tmp_path, order, is_adapted, loads_best
):
    trainer, audit, witness = run(
        tmp_path, order=order, stop_after=2, limit=0.999, loads_best=loads_best, is_adapted=is_adapted
    )

    assert trainer.state.global_step == 2 * N_STEPS_IN_EPOCH
    assert audit.history.stopped is None
    assert in_budget_steps(audit.history) == [0, 8, 16]
    assert assert_inside_budget(tmp_path, trainer, audit, witness) in (8, 16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("loads_best", "is_adapted"), SETUPS)
def test_a_budget_that_is_crossed_first_ends_the_run(tmp_path, order, is_adapted, loads_best):
    trainer, audit, witness = run(
        tmp_path, order=order, stop_after=100, loads_best=loads_best, is_adapted=is_adapted
    )

    assert trainer.state.global_step == audit.history.stopped.step < trainer.state.max_steps
    assert assert_inside_budget(tmp_path, trainer, audit, witness) < audit.history.stopped.step


@pytest.mark.parametrize("loads_best", LOADS_BEST)
@pytest.mark.parametrize("patience", [0, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_early_stopping_at_the_epoch_that_crosses_the_budget_leaves_the_one_before(
    tmp_path, epoch_over, order, patience, loads_best
):
    """With patience left the audit itself would go on, and the model is over budget when training ends."""
    trainer, audit, witness = run(
        tmp_path, order=order, stop_after=epoch_over, patience=patience, loads_best=loads_best
    )

    assert trainer.state.global_step == epoch_over * N_STEPS_IN_EPOCH
    assert audit.history[-1].decision.is_within_budget is False
    assert (audit.history.stopped is None) == (patience > 0)
    assert assert_inside_budget(tmp_path, trainer, audit, witness) < trainer.state.global_step


@pytest.mark.parametrize("order", ORDERS)
def test_steps_that_early_stopping_cuts_off_from_the_next_audit_are_audited(tmp_path, epoch_over, order):
    """Every checkpoint is audited before it is written, whatever `every` says."""
    trainer, audit, witness = run(tmp_path, order=order, stop_after=epoch_over, every=1000)

    assert trainer.state.global_step == epoch_over * N_STEPS_IN_EPOCH
    assert audit.history[-1].decision.is_within_budget is False
    assert assert_inside_budget(tmp_path, trainer, audit, witness) < trainer.state.global_step


@pytest.mark.parametrize("order", ORDERS)
def test_early_stopping_can_watch_a_leakage_figure(tmp_path, order):
    trainer, audit, witness = run(
        tmp_path,
        order=order,
        stop_after=2,
        limit=0.999,
        metric_for_best_model="privacy_auc",
        greater_is_better=False,
    )

    least = min(audit.history.audits_after_baseline, key=lambda result: result.metrics["auc"].value)
    assert [result.step for result in audit.history] == expected_when_order(order)
    assert assert_inside_budget(tmp_path, trainer, audit, witness) == least.step


def expected_when_order(order):
    """Early stopping before the audit does not see its figure."""
    return [0, 8, 16] if order == "audit first" else [8 * epoch for epoch in range(N_EPOCHS + 1)]
