"""A small Hugging Face training on the models of `tiny`."""

from tiny import make_model, make_rows, make_texts, make_tokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    trainer_utils,
)

from ezmia_callbacks import LeakageBudget, hold_out_canaries
from ezmia_callbacks.audit.judge import Judge
from ezmia_callbacks.functional.budget import Decision

# Transformers 4.46 does not have this `save_strategy` yet.
SAVES_BEST = hasattr(getattr(trainer_utils, "SaveStrategy", None), "BEST")


def draw(*, n=120, n_members=30, n_non_members=60, seed=0):
    return hold_out_canaries(
        make_rows(make_texts(n)), n_members=n_members, n_non_members=n_non_members, seed=seed
    )


def make_trainer(
    path,
    rows,
    callbacks=(),
    *,
    model=None,
    model_init=None,
    collator=None,
    eval_dataset=None,
    trainer_class=Trainer,
    optimizers=(None, None),
    **arguments,
):
    tokenizer = make_tokenizer()
    settings = {
        "output_dir": str(path),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    } | arguments
    return trainer_class(
        (model or make_model()) if model_init is None else None,
        TrainingArguments(**settings),
        model_init=model_init,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=collator or DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def without_timing(rows):
    return [
        {name: value for name, value in row.items() if "per_second" not in name and "runtime" not in name}
        for row in rows
        if not any(name.startswith("privacy/") for name in row)
    ]


def stop_without_a_verdict(monkeypatch, *, after):
    """So many audits after the baseline are judged; then the canaries can carry no verdict any more."""
    decide = Judge.decide

    def judge(self, metrics, history, *, is_baseline, **of_feeding):
        if len(history) <= after:
            return decide(self, metrics, history, is_baseline=is_baseline, **of_feeding)
        return Decision(True, None, "AUC cannot be judged any more: the run was to end by now")

    monkeypatch.setattr(Judge, "decide", judge)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = True


NEVER_CROSSED = LeakageBudget(limit=0.99, rule="point")
