"""What the processes of Ray do, for `test_ray.py`."""

import os
import time
from pathlib import Path
from typing import Any

from huggingface_tiny import draw, make_trainer
from transformers import TrainerCallback


class EndsTheProcessOnce(TrainerCallback):
    """At a step, on the second of two processes, the first time."""

    def __init__(self, step: int, told: Path):
        self.step, self.told = step, told

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1 and not self.told.exists():
            self.told.touch()
            os._exit(1)


def train_in_a_group(config: dict[str, Any]) -> None:
    """One of two workers, of which one dies between checkpoints; what Ray starts then goes on."""
    import ray.train
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer

    folder, (rows, _) = config["folder"], draw()
    trainer = make_trainer(
        folder / "run",
        rows,
        [config["audit"], RayTrainReportCallback(), EndsTheProcessOnce(22, folder / "died")],
        num_train_epochs=12,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        save_strategy="epoch",
    )
    trainer = prepare_trainer(trainer)
    if (checkpoint := ray.train.get_checkpoint()) is None:
        trainer.train()
    else:
        with checkpoint.as_directory() as path:
            trainer.train(resume_from_checkpoint=str(Path(path) / RayTrainReportCallback.CHECKPOINT_NAME))
    trainer.save_model(str(folder / "final"))


def train_in_one_folder(config: dict[str, Any], *, audit, folder: Path) -> None:
    """A trial that begins when another one does, and writes to the same folder."""
    from ray import tune

    rows, _ = draw()
    trainer = make_trainer(folder / "run", rows, [audit], num_train_epochs=2)
    (folder / f"ready-{config['number']}").touch()
    deadline = time.monotonic() + 120
    while len(list(folder.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    trainer.train()
    tune.report({"verdict": audit.history[-1].verdict})
