"""The recipes of the documentation, run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_tiny import make_trainer
from supervised_tiny import SupervisedRows, collate_supervised
from tiny import make_model, make_rows, make_texts, make_tokenizer
from transformers import Trainer, TrainingArguments

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
N_ROWS = 300

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
)


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (HOW_TO / page).read_text("utf-8"), re.DOTALL)


def run(snippet, names):
    exec(compile(snippet, "snippet", "exec"), names)
    return names


def make_datasets_stream():
    return Dataset.from_list(make_rows(make_texts(N_ROWS))).to_iterable_dataset()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_rows(make_texts(N_ROWS)))


@pytest.mark.parametrize(("number", "make_stream"), [(0, make_datasets_stream), (1, Stream)])
def test_canaries_of_a_stream_are_drawn_from_its_head(tmp_path, number, make_stream, monkeypatch):
    # The stream is shorter than the head of the recipe, of which only the length is another.
    snippet = snippets("streams.md")[number].replace("10_000", "200")

    found = run(snippet, {"stream": make_stream()})
    make_trainer(tmp_path, found["train_dataset"], [found["audit"]], max_steps=35).train()

    audit = found["audit"]
    n_times, is_member = audit.auditor.exposures.n_times, audit.auditor.encoded.is_member
    assert len(list(found["train_dataset"])) == N_ROWS - 20
    assert (is_member.sum(), (~is_member).sum()) == (40, 20)
    assert (n_times[is_member] == 1).all()
    assert not n_times[~is_member].any()


def test_a_script_like_alpacas_is_audited_without_an_evaluation_set(tmp_path):
    (snippet,) = snippets("supervised-scripts.md")

    def make_supervised_data_module(tokenizer, data_args):
        dataset = SupervisedRows(make_texts(N_ROWS))
        return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collate_supervised}

    found = run(
        snippet,
        {
            "make_supervised_data_module": make_supervised_data_module,
            "tokenizer": make_tokenizer(),
            "data_args": None,
            "model": make_model(),
            "Trainer": Trainer,
            "training_args": TrainingArguments(
                str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
            ),
        },
    )

    assert len(found["trainer"].train_dataset) == N_ROWS * 9 // 10
    assert found["audit"].history[-1].step == 2
    assert found["audit"].history.n_failed == 0
