"""What a stop leaves in the model is what it says: whatever was trained, whoever else wrote into it."""

import copy
import logging
from functools import partial

import lightning_tiny
import own_loop
import pytest
import torch
from huggingface_tiny import draw, make_trainer
from lightning import pytorch as pl
from restoring import Witness, assert_same_weights, checkpoints, make_adapted_model, weights
from tiny import make_model, make_rows, make_texts
from transformers import Trainer, TrainerCallback
from verdicts import judge_by_number

from ezmia_callbacks import (
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    PrivacyAuditor,
)
from ezmia_callbacks.audit import kept_weights
from ezmia_callbacks.errors import AuditError, ConfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # peft reads a name that transformers 5 renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Whoever adds a second adapter, and merges the first.
    pytest.mark.filterwarnings("ignore:.*adapter.*:UserWarning"),
]

BUDGET = LeakageBudget(limit=0.65, rule="point")


@pytest.fixture
def stop_at(monkeypatch):
    """Have audit number so and so be the first one over budget, whatever it finds."""

    return partial(judge_by_number, monkeypatch)


# Layers that are trained in turns, or one after the other.


class Turns(TrainerCallback):
    """As LISA does it: each step trains another layer."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for i, block in enumerate(model.transformer.h):
            block.requires_grad_(i == state.global_step % 2)


class Unfreezing(TrainerCallback):
    """The head first, then one layer more every five steps, from the top."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.requires_grad_(False)
        model.transformer.ln_f.requires_grad_(True)
        for i, block in enumerate(reversed(model.transformer.h)):
            block.requires_grad_(state.global_step >= 5 * (i + 1))


class ToggleEverySecondEpoch(TrainerCallback):
    """A layer is trained between two audits alone, and frozen at each of them."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.transformer.h[0].requires_grad_(state.global_step % 8 in (2, 3))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.transformer.h[0].requires_grad_(False)


def frozen_model(*names):
    model = make_model()
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return model


@pytest.mark.parametrize("trained_by", [Turns, Unfreezing, ToggleEverySecondEpoch])
@pytest.mark.parametrize("first_over", [1, 2, 3])
def test_layers_in_turns_come_back_whole(tmp_path, stop_at, caplog, trained_by, first_over):
    rows, canaries = draw()
    stop_at(first_over)
    witness, audit = Witness(), PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    names = ["transformer.ln_f"] if trained_by is not Turns else ["transformer.h.1"]
    model = frozen_model(*names)
    # Trainer's optimizer knows what is trained at its start alone.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = make_trainer(
        tmp_path,
        rows,
        [trained_by(), witness, audit],
        model=model,
        optimizers=(optimizer, None),
        num_train_epochs=5,
    )

    trainer.train()

    step = 8 * (first_over - 1)
    assert audit.history.stopped.step == 8 * first_over
    assert sum(not torch.equal(a, witness.weights[8][name]) for name, a in witness.weights[0].items()) > 2
    assert_same_weights(trainer.model, witness.weights[step])
    assert "Restored the " in caplog.text


def test_layers_in_turns_come_back_whole_in_lightning(tmp_path, stop_at):
    class InTurns(lightning_tiny.TinyModule):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def on_train_batch_start(self, batch, batch_idx):
            for i, block in enumerate(self.model.transformer.h):
                block.requires_grad_(i == self.global_step % 2)

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept[trainer.global_step] = weights(pl_module)

    rows, canaries = lightning_tiny.draw()
    stop_at(3)
    kept, module = {}, InTurns(frozen_model("transformer.h.0"))
    audit = LightningPrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = lightning_tiny.make_trainer(tmp_path, [Keep(), audit], max_epochs=5)
    trainer.fit(module, lightning_tiny.make_loader(rows))

    assert audit.history.stopped.step == 24
    assert_same_weights(module, kept[16])


# What was frozen and moved all the same.


def test_an_adapter_merged_and_started_anew_is_said_at_the_audit(stop_at, caplog):
    """As ReLoRA does it. The weights of before the merge cannot come back: nobody kept the base."""
    from peft import LoraConfig, get_peft_model

    rows, canaries = own_loop.draw()
    stop_at(2, patience=1)
    model = make_adapted_model()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=4)
    auditor.begin(model)
    own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    first = auditor.audit(model)
    base = model.merge_and_unload()
    config = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    auditor.watch(model)
    own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    present = weights(model)

    second = auditor.audit(model)

    assert not any(finding.name == "kept weights" for finding in first.findings)
    (said,) = [finding.text for finding in second.findings if finding.name == "kept weights"]
    assert "cannot be put back whole: the model had" in said
    assert "OVER BUDGET" in said
    assert said in caplog.text
    with pytest.raises(AuditError, match="step 1 cannot be put back whole"):
        auditor.restore_within_budget(model)
    assert_same_weights(model, present)


def test_an_adapter_merged_inside_the_budget_is_kept_whole_from_then_on(stop_at):
    rows, canaries = own_loop.draw()
    stop_at(3)
    model = make_adapted_model()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=4)
    auditor.begin(model)
    for _ in range(2):
        own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
        # Merged in place, and unmerged: the base moves by rounding, and no counter tells.
        model.merge_adapter()
        model.unmerge_adapter()
        result = auditor.audit(model)
        assert result.decision.is_within_budget
    expected = weights(model)
    own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    auditor.audit(model)

    assert auditor.restore_within_budget(model).step == 2

    assert_same_weights(model, expected)


def test_embeddings_that_were_resized_are_said_at_the_audit_and_kept_from_then_on(stop_at):
    rows, canaries = own_loop.draw()
    stop_at(2)
    model = make_model()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=3, assume_seen=True)
    auditor.begin(model)
    model.resize_token_embeddings(72)
    own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    auditor.audit(model)
    expected = weights(model)
    own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
    auditor.audit(model)

    auditor.restore_within_budget(model)
    assert_same_weights(model, expected)

    model.resize_token_embeddings(80)
    with pytest.raises(AuditError, match="1 tensors have another shape or type now"):
        auditor.restore_within_budget(model)


def test_what_is_no_tensor_and_changes_the_model_is_seen(stop_at):
    """The tensors are back, the adapter is switched off: that is not the model of that step."""
    rows, canaries = own_loop.draw()
    stop_at(2)
    model = make_adapted_model()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=3)
    auditor.begin(model)
    for _ in range(2):
        own_loop.train_one_epoch(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2))
        auditor.audit(model)
    with (
        model.disable_adapter(),
        pytest.raises(AuditError, match="step 1 are in the model again, and yet it gives the canaries other"),
    ):
        auditor.restore_within_budget(model)


def test_several_adapters_are_named_before_the_first_step(caplog):
    from peft import LoraConfig

    _, canaries = own_loop.draw()
    model = make_adapted_model()
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model.add_adapter("second", config)

    PrivacyAuditor(canaries, budget=BUDGET, n_audits=3).begin(model)

    assert "The model has 2 adapters (default, second)." in caplog.text


# Optimizers that have the weights a second time.


class MixedPrecision(torch.optim.AdamW):
    """The groups hold float32 copies; the model, in bfloat16, follows after each step."""

    def __init__(self, parameters, lr):
        self.model_parameters = list(parameters)
        super().__init__([torch.nn.Parameter(p.detach().float()) for p in self.model_parameters], lr=lr)

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        for master, parameter in zip(group["params"], self.model_parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        super().step(closure)
        for master, parameter in zip(group["params"], self.model_parameters, strict=True):
            parameter.copy_(master)

    def zero_grad(self, set_to_none=True):
        for parameter in self.model_parameters:
            parameter.grad = None


def step_at_learning_rate_zero(model, optimizer):
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ids = torch.tensor([[3, 4, 5, 6]])
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_master_weights_of_a_plain_loop_follow(stop_at):
    rows, canaries = own_loop.draw()
    stop_at(2)
    model = make_model().bfloat16()
    optimizer = MixedPrecision(model.parameters(), 1e-2)
    auditor = PrivacyAuditor(canaries, budget=BUDGET, n_audits=3)
    auditor.begin(model)
    own_loop.train_one_epoch(model, rows, optimizer)
    auditor.audit(model)
    expected = weights(model)
    own_loop.train_one_epoch(model, rows, optimizer)
    auditor.audit(model)

    auditor.restore_within_budget(model, optimizer)
    optimizer.state.clear()
    step_at_learning_rate_zero(model, optimizer)

    assert_same_weights(model, expected)


def test_master_weights_under_trainer_follow(tmp_path, stop_at):
    rows, canaries = draw()
    stop_at(2)
    model = make_model().bfloat16()
    witness, optimizer = Witness(), MixedPrecision(model.parameters(), 1e-2)
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(
        tmp_path, rows, [witness, audit], model=model, optimizers=(optimizer, None), max_grad_norm=0.0
    )
    trainer.train()
    assert_same_weights(model, witness.weights[8])

    step_at_learning_rate_zero(model, optimizer)

    assert_same_weights(model, witness.weights[8])


def test_master_weights_under_lightning_follow(tmp_path, stop_at):
    class Module(lightning_tiny.TinyModule):
        def configure_optimizers(self):
            return MixedPrecision(self.parameters(), 1e-2)

    rows, canaries = lightning_tiny.draw()
    stop_at(2)
    kept, module = {}, Module(make_model().bfloat16())

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept[trainer.global_step] = weights(pl_module)

    audit = LightningPrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = lightning_tiny.make_trainer(tmp_path, [Keep(), audit], max_epochs=5)
    trainer.fit(module, lightning_tiny.make_loader(rows))
    assert_same_weights(module, kept[8])

    step_at_learning_rate_zero(module.model, trainer.optimizers[0])

    assert_same_weights(module, kept[8])


def test_an_optimizer_of_8_bits_comes_back(tmp_path, stop_at):
    """Its states are quantized, its weights are the model's."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rows, canaries = draw()
    stop_at(2)
    model = make_model()
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=16)
    witness, audit = Witness(), PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(tmp_path, rows, [witness, audit], model=model, optimizers=(optimizer, None))
    try:
        trainer.train()
    except (NotImplementedError, RuntimeError, AttributeError, ValueError) as error:
        pytest.skip(f"this release of bitsandbytes cannot step on a CPU: {error}")

    assert audit.history.stopped.step == 16
    assert_same_weights(trainer.model, witness.weights[8])


# Others who write into the model.


class Average(TrainerCallback):
    """An average of the weights, as users write it: updated at each step, copied in at the end."""

    def __init__(self, *, decay=0.5, at="on_train_end"):
        self.decay, self.at = decay, at

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, p in model.named_parameters():
            self.shadow[name].mul_(self.decay).add_(p.detach(), alpha=1 - self.decay)

    @torch.no_grad()
    def copy_in(self, model):
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.at == "on_train_end":
            self.copy_in(model)


@pytest.mark.parametrize("is_first", [True, False])
def test_an_average_that_is_copied_in_at_the_end_is_audited_as_it_is(tmp_path, stop_at, caplog, is_first):
    rows, canaries = draw()
    stop_at(9)
    caplog.set_level(logging.INFO)
    average, witness = Average(), Witness()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    callbacks = [average, audit, witness] if is_first else [audit, witness, average]
    trainer = make_trainer(tmp_path, rows, callbacks)

    trainer.train()

    assert [result.step for result in audit.history] == [0, 8, 16, 24, 24]
    assert audit.history[-1].member_loss != audit.history[-2].member_loss
    if is_first:
        # Seen by the audit of the end itself, which stands behind it.
        assert_same_weights(trainer.model, witness.at_end)
    assert torch.equal(trainer.model.transformer.wte.weight, average.shadow["transformer.wte.weight"])
    assert "does not hold the weights of any audit" in caplog.text


def test_an_average_over_the_budget_is_taken_out_again(tmp_path, stop_at, caplog):
    rows, canaries = draw()
    stop_at(4)  # the fourth audit is that of the average
    average, witness = Average(), Witness()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(tmp_path, rows, [witness, audit, average])

    trainer.train()

    assert_same_weights(trainer.model, witness.weights[24])
    assert "Restored the weights of step 24" in caplog.text


def test_an_average_after_a_stop_does_not_stay(tmp_path, stop_at):
    """The line said: holds the weights of step 8 again. And then the average came."""
    rows, canaries = draw()
    stop_at(2)
    average, witness = Average(), Witness()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(tmp_path, rows, [witness, audit, average])

    trainer.train()

    assert_same_weights(trainer.model, witness.weights[8])


def test_without_a_budget_too_the_last_line_is_about_the_model_that_is_left(tmp_path, caplog):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, every="epoch")

    make_trainer(tmp_path, rows, [audit, Average()]).train()

    assert audit.history[-1].step == audit.history[-2].step == 24
    assert "does not hold the weights of any audit" in caplog.text


def test_a_model_that_nobody_wrote_into_is_not_audited_twice(tmp_path, caplog):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.85), every="epoch", score="ez")
    trainer = make_trainer(tmp_path, rows, [audit])

    trainer.train()

    assert [result.step for result in audit.history] == [0, 8, 16, 24]
    assert "any audit" not in caplog.text
    assert not any(type(c).__name__ == "LastWord" for c in trainer.callback_handler.callbacks)


def test_the_best_checkpoint_that_is_loaded_has_the_figures_of_its_audit(tmp_path, caplog):
    rows, canaries = draw()
    caplog.set_level(logging.INFO)
    audit = PrivacyAuditCallback(canaries, every="epoch")
    trainer = make_trainer(
        tmp_path,
        rows,
        [audit],
        eval_dataset=make_rows(make_texts(20, seed=8)),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="privacy_auc",
        greater_is_better=True,
    )

    trainer.train()

    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 24
    assert len(audit.history) == 4
    assert (
        f"holds the weights of step {best}, not the last ones: its figures are those of that audit"
        in caplog.text
    )


class AverageForEvaluation(Average):
    """Copied in for each evaluation, and out after it, as the packages for averages do it."""

    def __init__(self):
        super().__init__(at="on_evaluate")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if control.should_evaluate:
            self.trained = weights(model)
            self.copy_in(model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.trained)


def test_an_average_for_evaluations_does_not_stay_and_training_is_audited(tmp_path, stop_at):
    rows, canaries = draw()
    stop_at(3)
    witness, audit = Witness(), PrivacyAuditCallback(canaries, budget=BUDGET, every=4)
    trainer = make_trainer(
        tmp_path,
        rows,
        [witness, audit, AverageForEvaluation()],
        eval_dataset=make_rows(make_texts(20, seed=8)),
        eval_strategy="steps",
        eval_steps=4,
    )

    trainer.train()

    assert [result.step for result in audit.history] == [0, 4, 8, 12]
    assert_same_weights(trainer.model, witness.weights[8])


class SwapForSaving(Average):
    """Writes the average into the checkpoint, and goes on with the weights in training."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        if control.should_save:
            self.trained = weights(model)
            self.copy_in(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if getattr(self, "trained", None) is not None:
            model.load_state_dict(self.trained)
            self.trained = None


def test_an_average_that_is_saved_is_audited_as_it_was_saved(tmp_path, stop_at, caplog):
    rows, canaries = draw()
    stop_at(2)  # the first audit is of the training, the second of what was saved
    witness, audit = Witness(), PrivacyAuditCallback(canaries, budget=BUDGET, every=100)
    trainer = make_trainer(
        tmp_path,
        rows,
        [witness, audit, SwapForSaving()],
        save_strategy="steps",
        save_steps=5,
    )

    trainer.train()

    assert [result.step for result in audit.history][:3] == [0, 5, 5]
    assert audit.history.stopped.step == 5
    assert checkpoints(tmp_path) == []
    assert checkpoints(tmp_path / "_privacy_audit" / "over_budget") == [5]
    assert (tmp_path / "_privacy_audit" / "over_budget" / "README.md").read_text().startswith("# Over")


class LightningAverage(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.average = torch.optim.swa_utils.AveragedModel(pl_module.model)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.average.update_parameters(pl_module.model)

    def on_train_end(self, trainer, pl_module):
        pl_module.model.load_state_dict(self.average.module.state_dict())


@pytest.mark.parametrize("budget", [BUDGET, None], ids=["budget", "no budget"])
@pytest.mark.parametrize("first_over", [2, 4, 9])
def test_an_average_in_lightning_is_audited_as_it_is(tmp_path, stop_at, caplog, first_over, budget):
    rows, canaries = lightning_tiny.draw()
    if budget is not None:
        stop_at(first_over)
    kept, module = {}, lightning_tiny.TinyModule()

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept[trainer.global_step] = weights(pl_module)

    average = LightningAverage()
    audit = LightningPrivacyAuditCallback(canaries, budget=budget, every="epoch")
    trainer = lightning_tiny.make_trainer(tmp_path, [Keep(), audit, average], max_epochs=3)
    trainer.fit(module, lightning_tiny.make_loader(rows))

    if budget is None or first_over == 9:
        assert [result.step for result in audit.history] == [0, 8, 16, 24, 24]
        assert torch.equal(module.model.lm_head.weight, average.average.module.lm_head.weight)
        assert "does not hold the weights of any audit" in caplog.text
    else:
        assert_same_weights(module, kept[8 * min(3, first_over - 1)])


# The trainer's own checkpoint stands for what is kept.


def test_a_checkpoint_is_pinned_against_the_limit_and_not_written_twice(tmp_path, stop_at, monkeypatch):
    rows, canaries = draw()
    stop_at(2, patience=2)
    written = []
    write = kept_weights.write_tensors
    monkeypatch.setattr(
        kept_weights, "write_tensors", lambda path, t: (written.append(path.name), write(path, t))
    )
    witness = Witness()

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 12:
                audit.auditor.state_dict()  # waits
                (path,) = (tmp_path / "_privacy_audit" / "last_within_budget").glob("*.safetensors")
                seen.append((path.name, path.stat().st_nlink, checkpoints(tmp_path)))

    seen = []
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(
        tmp_path,
        rows,
        [witness, Look(), audit],
        num_train_epochs=6,
        save_strategy="epoch",
        save_total_limit=1,
    )

    trainer.train()

    assert written == ["0-0-0.safetensors"]  # of the start, which the trainer does not save
    assert seen == [("0-8-0.safetensors", 2, [8])]
    assert audit.history.stopped.step == 32
    assert_same_weights(trainer.model, witness.weights[8])


def test_the_pinned_weights_outlive_the_trainers_checkpoint(tmp_path, stop_at):
    import shutil

    rows, canaries = draw()
    stop_at(2)
    witness = Witness()

    class Delete(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 12:
                shutil.rmtree(tmp_path / "checkpoint-8")

    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(tmp_path, rows, [witness, audit, Delete()], save_strategy="epoch")

    trainer.train()

    assert audit.history.stopped.step == 16
    assert_same_weights(trainer.model, witness.weights[8])


class Forbid(TrainerCallback):
    """Takes back a checkpoint that the trainer was about to write."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = False


def test_a_checkpoint_that_does_not_come_is_written_by_the_audit(tmp_path, stop_at):
    rows, canaries = draw()
    stop_at(2)
    witness, audit = Witness(), PrivacyAuditCallback(canaries, budget=BUDGET, every=100)
    trainer = make_trainer(tmp_path, rows, [witness, audit, Forbid()], save_strategy="steps", save_steps=8)

    trainer.train()

    assert checkpoints(tmp_path) == []
    assert audit.history.stopped.step == 16
    assert_same_weights(trainer.model, witness.weights[8])


# Rejected weights.


@pytest.mark.parametrize("is_adapted", [False, True])
def test_rejected_weights_are_kept_aside_if_asked_for(tmp_path, stop_at, caplog, is_adapted):
    rows, canaries = draw()
    stop_at(2)
    witness = Witness()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch", keep_rejected=True)
    model = make_adapted_model() if is_adapted else make_model()
    trainer = make_trainer(tmp_path, rows, [witness, audit], model=model)

    trainer.train()

    assert_same_weights(trainer.model, witness.weights[8])
    aside = tmp_path / "_privacy_audit" / "over_budget" / "step-16"
    if is_adapted:
        fresh = make_adapted_model()
        fresh.load_adapter(aside, "default")
    else:
        fresh = make_model().from_pretrained(aside)
    rejected = copy.deepcopy(witness.weights[16])
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, rejected[name]), name
    assert f"The weights over the budget are in {aside}" in caplog.text
    for path in aside.rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o77 == 0, path


def test_rejected_weights_are_gone_otherwise_and_the_line_says_so(tmp_path, stop_at, caplog):
    rows, canaries = draw()
    stop_at(2)
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")

    make_trainer(tmp_path, rows, [audit]).train()

    assert not (tmp_path / "_privacy_audit" / "over_budget").exists()
    assert "What was trained after step 8, until step 16, is gone (`keep_rejected=True`" in caplog.text


def test_rejected_weights_in_lightning_and_in_a_plain_loop(tmp_path, stop_at):
    rows, canaries = lightning_tiny.draw()
    stop_at(2)
    module = lightning_tiny.BareModule()
    audit = LightningPrivacyAuditCallback(
        canaries,
        budget=BUDGET,
        every="epoch",
        keep_rejected=True,
        output_dir=tmp_path / "audit",
        logits_fn=lightning_tiny.bare_logits,
    )
    trainer = lightning_tiny.make_trainer(tmp_path, [audit], max_epochs=4)
    trainer.fit(module, lightning_tiny.make_loader(rows))

    assert (tmp_path / "audit" / "over_budget" / "step-16" / "weights-0.safetensors").exists()
    with pytest.raises(ConfigurationError, match="`keep_rejected=True` needs an `output_dir`"):
        PrivacyAuditor(canaries, budget=BUDGET, keep_rejected=True)
    with pytest.raises(ConfigurationError, match="needs a `budget` and `restore=True`"):
        PrivacyAuditCallback(canaries, keep_rejected=True)


# What a stranger broke.


class SavesAnAverage(Trainer):
    """A trainer of one's own, whose checkpoints hold an average of the weights."""

    def _save(self, output_dir=None, state_dict=None):
        held = weights(self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.9)
        super()._save(output_dir)
        self.model.load_state_dict(held)


@pytest.mark.parametrize("make", [make_model, make_adapted_model])
@pytest.mark.parametrize("saves", ["epoch", "steps"])
def test_a_checkpoint_of_other_weights_is_said_and_moved_and_the_audited_ones_are_kept(
    tmp_path, stop_at, caplog, make, saves
):
    rows, canaries = draw()
    stop_at(3)
    witness, audit = Witness(), PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(
        tmp_path,
        rows,
        [witness, audit],
        model=make(),
        trainer_class=SavesAnAverage,
        save_strategy=saves,
        save_steps=8,
    )

    trainer.train()

    assert audit.history.stopped.step == 24
    assert checkpoints(tmp_path) == []
    assert checkpoints(tmp_path / "_privacy_audit" / "over_budget") == [8, 16]
    assert caplog.text.count("holds other weights than those that were audited, and may be OVER BUDGET") == 2
    assert_same_weights(trainer.model, witness.weights[16])


def test_the_only_checkpoint_is_looked_at_too(tmp_path, stop_at, caplog):
    rows, canaries = draw()
    stop_at(9)
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    make_trainer(
        tmp_path, rows, [audit], trainer_class=SavesAnAverage, save_strategy="steps", save_steps=24
    ).train()

    assert checkpoints(tmp_path) == []
    assert "holds other weights than those that were audited" in caplog.text


def test_a_second_training_does_not_take_unaudited_weights_for_those_within_the_budget(
    tmp_path, stop_at, caplog
):
    rows, canaries = draw()
    stop_at(2)
    model = make_model()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(tmp_path / "first", rows, [audit], model=model, num_train_epochs=1)
    trainer.train()
    make_trainer(tmp_path / "second", rows, [], model=model, num_train_epochs=2).train()
    stop_at(1)

    trainer.train()

    assert "was never audited as it is, so that it is not kept" in caplog.text
    assert "Earlier weights could not be restored" in caplog.text
    assert "OVER BUDGET" in caplog.text
    assert "Restored the starting weights" not in caplog.text


def test_a_second_training_after_a_failed_restore_is_not_within_the_budget(tmp_path, stop_at, caplog):
    rows, canaries = draw()
    stop_at(1)
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")

    class LoseWeights(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            audit.auditor._weights._kept.discard()

    trainer = make_trainer(tmp_path, rows, [audit, LoseWeights()], num_train_epochs=1)
    trainer.train()
    assert "OVER BUDGET" in caplog.text
    caplog.clear()

    trainer.train()

    assert "over budget, or could not be judged, so that it is not kept" in caplog.text
    assert "Restored" not in caplog.text


@pytest.mark.usefixtures("checkpoints_of_old_releases")
def test_a_resume_does_not_believe_that_the_checkpoint_holds_what_was_audited(tmp_path, stop_at, caplog):
    from safetensors.torch import load_file, save_file

    rows, canaries = draw()
    stop_at(9)
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    make_trainer(tmp_path, rows, [audit], num_train_epochs=1, save_strategy="epoch").train()
    path = tmp_path / "checkpoint-8" / "model.safetensors"
    save_file({name: 1.5 * t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    stop_at(2)
    resumed = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(tmp_path, rows, [resumed], num_train_epochs=3, save_strategy="epoch")

    trainer.train(resume_from_checkpoint=True)

    assert "The checkpoint of step 8 does not hold the weights that were audited at that step" in caplog.text
    assert "Restored the weights of step 8" not in caplog.text
    assert "OVER BUDGET" in caplog.text


def test_weights_whose_checkpoint_was_called_off_at_the_last_step_are_kept(tmp_path, stop_at):
    rows, canaries = draw()
    stop_at(4)  # the average at the end
    witness, audit = Witness(), PrivacyAuditCallback(canaries, budget=BUDGET, every=8)
    trainer = make_trainer(
        tmp_path,
        rows,
        [witness, Average(), audit, Forbid()],
        save_strategy="steps",
        save_steps=8,
    )

    trainer.train()

    assert_same_weights(trainer.model, witness.weights[24])


def test_older_weights_are_not_called_the_last_ones_within_the_budget(tmp_path, stop_at, monkeypatch, caplog):
    rows, canaries = draw()
    stop_at(3)
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    write = kept_weights.write_tensors

    def fill_up(path, tensors):
        if "-16-" in path.name:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(kept_weights, "write_tensors", fill_up)
    make_trainer(tmp_path, rows, [audit]).train()

    assert "Restored the weights of step 8, the last audit within it that could be kept" in caplog.text


def test_a_callback_that_was_added_during_training_does_not_have_the_last_word(tmp_path, stop_at):
    rows, canaries = draw()
    stop_at(9)
    average = Average()

    class Add(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                average.on_train_begin(args, state, control, model=model)
                trainer.add_callback(average)

    audit = PrivacyAuditCallback(canaries, every="epoch")
    trainer = make_trainer(tmp_path, rows, [audit, Add()])

    trainer.train()

    assert [result.step for result in audit.history] == [0, 8, 16, 24, 24]


def test_another_adapter_at_the_end_is_another_model(tmp_path, caplog):
    rows, canaries = draw()

    class SwitchOff(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.base_model.disable_adapter_layers()

    audit = PrivacyAuditCallback(canaries, every="epoch")
    make_trainer(tmp_path, rows, [audit, SwitchOff()], model=make_adapted_model()).train()

    assert [result.step for result in audit.history] == [0, 8, 16, 24, 24]
    first, last = (
        {score: metrics["auc"].value for score, metrics in audit.history[at].judged.items()} for at in (0, -1)
    )
    assert last == first


def test_a_model_that_cannot_save_itself_does_not_keep_the_weights_over_the_budget(
    tmp_path, stop_at, caplog, monkeypatch
):
    rows, canaries = draw()
    stop_at(2)
    witness = Witness()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch", keep_rejected=True)
    model = make_model()

    def fail(*_args, **_options):
        raise ValueError("GenerationConfig is invalid")

    model.save_pretrained = fail
    trainer = make_trainer(tmp_path, rows, [witness, audit], model=model)
    trainer.train()

    assert_same_weights(trainer.model, witness.weights[8])
    assert "could not be written and are gone (ValueError in " in caplog.text


def test_a_training_that_an_error_ended_between_audit_and_checkpoint_can_be_started_again(tmp_path, stop_at):
    rows, canaries = draw()
    stop_at(2)
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")

    class Break(TrainerCallback):
        is_broken = False

        def on_epoch_end(self, args, state, control, **kwargs):
            if not self.is_broken:
                self.is_broken = True
                raise RuntimeError("of the user's own")

    witness = Witness()
    trainer = make_trainer(tmp_path, rows, [audit, Break(), witness], save_strategy="epoch")
    with pytest.raises(RuntimeError, match="of the user's own"):
        trainer.train()
    trainer.train()

    assert audit.history.stopped is not None


def test_a_script_that_changes_its_folder_finds_the_weights_again(tmp_path, stop_at, monkeypatch):
    rows, canaries = draw()
    stop_at(2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    witness = Witness()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch", output_dir="audit")

    class Leave(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 10:
                monkeypatch.chdir(tmp_path / "elsewhere")

    monkeypatch.setattr(kept_weights, "_SMALL", 0)
    trainer = make_trainer(tmp_path / "run", rows, [witness, audit, Leave()])
    trainer.train()

    assert_same_weights(trainer.model, witness.weights[8])


def test_a_checkpoint_in_lightning_is_made_anew_of_the_restored_weights(tmp_path, stop_at):
    """Also where the module's state is made of copies, and optimizers hold the weights a second time."""

    class HandsOutCopies(lightning_tiny.TinyModule):
        def state_dict(self, *args, **kwargs):
            return {name: t.clone() for name, t in super().state_dict(*args, **kwargs).items()}

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 20:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    rows, canaries = lightning_tiny.draw()
    stop_at(2, patience=5)
    kept, module = {}, HandsOutCopies()

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept[trainer.global_step] = weights(pl_module)

    audit = LightningPrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = lightning_tiny.make_trainer(tmp_path, [Keep(), audit, Save()], max_epochs=3)
    trainer.fit(module, lightning_tiny.make_loader(rows))

    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(tensor, kept[8][name]), name
    assert [state["state"] for state in saved["optimizer_states"]] == [{}]


def test_two_callbacks_that_would_both_restore_are_refused(tmp_path):
    rows, canaries = draw()
    one = PrivacyAuditCallback(canaries, budget=BUDGET)
    two = PrivacyAuditCallback(canaries, budget=BUDGET, prefix="two/", output_dir=tmp_path / "two")

    with pytest.raises(ConfigurationError, match="would each put weights back"):
        make_trainer(tmp_path, rows, [one, two]).train()
