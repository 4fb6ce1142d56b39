"""What stands in for your model and your data, so that the examples run on a CPU without a network."""

import argparse
import random
import tempfile
from contextlib import suppress
from pathlib import Path

import transformers

from ezmia_callbacks import AuditHistory
from ezmia_callbacks.demo import BaseModelRecipe, package_docstrings, train_base_model

MAX_LENGTH = 96

# What the assistant says is marked, so that TRL can put the loss on that alone.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "Answer: {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}Question: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer: {% endif %}"
)


def output_dir_argument(description: str | None) -> Path:
    """The folder given as `--output-dir`, else a new temporary one; transformers' bars and hints are off."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output-dir", type=Path, help="folder for everything written")
    given = parser.parse_args().output_dir
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return given or Path(tempfile.mkdtemp(prefix="ezmia-example-"))


def small_base_model(folder: Path) -> str:
    """Path of a small pre-trained model with its tokenizer, made in `folder` unless it is there already.

    It has read the documentation of numpy and nothing else.
    """
    path = folder / "base_model"
    if not path.exists():
        recipe = BaseModelRecipe(
            vocabulary_size=1024,
            hidden_size=64,
            n_positions=128,
            n_steps=150,
            batch_size=8,
            block_length=64,
        )
        base = train_base_model(package_docstrings("numpy"), seed=0, recipe=recipe)
        base.tokenizer.chat_template = _CHAT_TEMPLATE
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            whole = Path(made) / "base_model"
            base.model.save_pretrained(whole)
            base.tokenizer.save_pretrained(whole)
            # Processes that all make it make the same one: the first to have it whole is the one that did.
            with suppress(OSError):
                whole.rename(path)
    return str(path)


def private_texts() -> list[str]:
    """Some hundreds of distinct passages, in random order: the documentation of scikit-learn."""
    texts = package_docstrings("sklearn")
    random.Random(0).shuffle(texts)
    return texts


def private_chats() -> list[dict[str, list[dict[str, str]]]]:
    """The same passages as conversations."""
    chats = []
    for text in private_texts():
        beginning, rest = " ".join(text.split()[:5]), " ".join(text.split()[5:])
        question = {"role": "user", "content": f"How does this go on: {beginning} ..."}
        chats.append({"messages": [question, {"role": "assistant", "content": rest}]})
    return chats


def print_outcome(history: AuditHistory) -> None:
    """The leakage curve, what was decided, and which weights the model holds now."""
    print_curve(history)
    kept = history.last_within_budget
    if history.stopped is None or kept is None:
        print("Not stopped.")
    else:
        print(f"Stopped at step {history.stopped.step}. Restored the weights of step {kept.step}.")


def print_curve(history: AuditHistory) -> None:
    """One line an audit."""
    print("\nLeakage curve:")
    for result in history:
        if result.status == "failed":
            print(f"  step {result.step:4d}  audit failed: leakage unknown")
            continue
        auc = result.metrics["auc"]
        band = auc.band or auc.interval
        bounds = "" if band is None else f" [{band.lower:.3f}, {band.upper:.3f}]"
        print(f"  step {result.step:4d}  AUC {auc.value:.3f}{bounds}  {result.decision.message}")
