"""`ezmia audit --max-auc` cannot be talked into passing."""

import json
import shutil

import pytest
from adapters import edit_json, save_adapter, save_base
from command_line import refusal
from post_hoc_runs import as_texts, permute_vocabulary
from talking_models import ezmia_without_network, put_into_cache, talking_copy

from ezmia_callbacks.canaries.files import save_canaries

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
    # PEFT asks transformers 5 by the old name.
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    # PEFT looks for the base's configuration to see whether the vocabulary grew.
    "ignore:Could not find a config file:UserWarning",
)

NAME = "some-org/some-base"


@pytest.fixture
def gate(run):
    """Arguments of an audit that judges by the bare estimate."""

    def arguments(folder, *further, base=run.base, canaries=run.canaries_file, limit=0.6):
        bases = [] if base is None else ["--base", base]
        rule = ["--max-auc", limit, "--rule", "point", "--device", "cpu", "--batch-size", 16]
        return ["audit", folder, *bases, "--canaries", canaries, *rule, *further]

    return arguments


@pytest.fixture
def checkpoint(run, tmp_path):
    """A checkpoint that is over a limit of 0.6."""
    assert run.history[-1].metrics["auc"].value > 0.62
    shutil.copytree(run.folder / "checkpoint-60", tmp_path / "checkpoint-60")
    return tmp_path / "checkpoint-60"


@pytest.fixture
def texts(run, tmp_path):
    """The canaries of the run before they were tokenized."""
    save_canaries(as_texts(run.canaries), tmp_path / "texts.json")
    return tmp_path / "texts.json"


def test_a_permuted_vocabulary_does_not_turn_over_into_within(checkpoint, gate, texts, call):
    permute_vocabulary(checkpoint)

    assert "makes other tokens of 100 of 100" in refusal(call(*gate(checkpoint, canaries=texts)))
    code, out, _ = call(*gate(checkpoint, "--tokenizer", "base", canaries=texts))
    assert code == 1
    assert "OVER BUDGET: checkpoint-60" in out
    code, out, err = call(*gate(checkpoint, "--tokenizer", "checkpoint", "--json", canaries=texts))
    assert code == 0  # what it was before, and now has to be asked for
    (run,) = json.loads(out)["report"]["runs"]
    assert run["audits"][-1]["metrics"]["auc"]["value"] < 0.58
    assert "that of the base makes other tokens of 100 of 100" in run["checks"][-1]["text"]
    assert "that of the base makes other tokens of 100 of 100" in err


def test_a_released_adapter_that_is_no_twin_is_judged(call, gate, run, tmp_path):
    base = save_base(tmp_path / "base")
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "run"):
        save_adapter(folder, base=base)
    edit_json(tmp_path / "run" / "adapter_config.json", lora_alpha=8000)

    _, out, _ = call(*gate(tmp_path / "run", "--json", base=None))

    assert [c["path"] for c in json.loads(out)["checkpoints"]] == [
        str(tmp_path / "run" / "checkpoint-1"),
        str(tmp_path / "run"),
    ]
    assert json.loads(out)["skipped"] == []


def test_what_is_skipped_is_listed_in_every_output(run, call, gate, tmp_path):
    code, out, _ = call(*gate(run.folder, "-o", tmp_path / "out", limit=0.99))
    _, document, _ = call(*gate(run.folder, "--json", limit=0.99))
    _, markdown, _ = call("report", tmp_path / "out")
    call("report", tmp_path / "out", "-o", tmp_path / "r.html")

    sentence = "run was not audited: its configuration and its weights are, to the last bit, those of "
    assert code == 0
    assert f"Skipped: {sentence}checkpoint-60" in out
    assert json.loads(document)["skipped"] == [
        {"path": str(run.folder), "same_as": str(run.folder / "checkpoint-60")}
    ]
    assert sentence in json.dumps(json.loads(document)["report"])
    assert sentence in markdown
    assert sentence in (tmp_path / "r.html").read_text()


def test_a_named_adapter_of_a_checkpoint_is_listed_under_its_name(run, call, gate, tmp_path):
    save_adapter(tmp_path / "run" / "checkpoint-1", base=run.base, names=("default", "other"))

    _, out, _ = call(*gate(tmp_path / "run", base=None))

    assert [line.split()[0] for line in out.splitlines() if line.startswith("checkpoint-")] == [
        "checkpoint-1",
        "checkpoint-1/other",
    ]


def test_a_base_that_contradicts_the_adapter_is_bad_input_unless_forced(run, call, gate, tmp_path):
    other = save_base(tmp_path / "other", seed=9)
    save_adapter(tmp_path / "checkpoint-1", base=other)

    assert "on another base it is another model" in refusal(call(*gate(tmp_path / "checkpoint-1")))
    code, _, _ = call(*gate(tmp_path / "checkpoint-1", "--allow-other-base", limit=0.99))
    assert code == 0


@pytest.fixture
def adapter(tmp_path):
    """An adapter that names a base on a hub."""
    return save_adapter(tmp_path / "checkpoint-1", base=NAME)


def test_the_base_of_an_adapter_is_not_fetched_unless_that_is_allowed(adapter, gate, tmp_path):
    arguments = gate(adapter, base=None)

    outcome, connections = ezmia_without_network(*arguments, home=tmp_path / "home")
    # Without a network the client of the hub would try again and again, but for this setting.
    allowed, _ = ezmia_without_network(
        *arguments, "--allow-download", home=tmp_path / "home", is_offline=True
    )

    assert (outcome.returncode, outcome.stdout, connections) == (2, "", [])
    assert f"names '{NAME}' as its base, which is neither a folder here nor" in outcome.stderr
    assert "--allow-download" in outcome.stderr
    assert allowed.returncode == 2
    assert f"'{NAME}' cannot be loaded as the base model" in allowed.stderr


def test_a_base_in_the_cache_is_taken_without_a_connection(adapter, gate, texts, run, tmp_path):
    put_into_cache(run.base, NAME, home=tmp_path / "home")

    outcome, connections = ezmia_without_network(
        *gate(adapter, base=None, canaries=texts, limit=0.99), home=tmp_path / "home"
    )

    assert (outcome.returncode, connections) == (0, []), outcome.stderr


def test_code_of_a_checkpoint_does_not_run_and_nobody_is_asked(gate, run, tmp_path):
    folder = talking_copy(run.folder / "checkpoint-60", tmp_path / "checkpoint-60", marker=tmp_path / "ran")

    outcome, connections = ezmia_without_network(
        *gate(folder, "--json"), home=tmp_path / "home", answers="y\n" * 10
    )

    assert not (tmp_path / "ran").exists()
    assert (outcome.returncode, outcome.stdout, connections) == (2, "", [])
    assert "Code that comes with a model runs only with --trust-remote-code" in outcome.stderr
    assert "[y/N]" not in outcome.stderr


def test_code_that_may_run_cannot_print_into_the_json(gate, run, tmp_path):
    folder = talking_copy(run.folder / "checkpoint-60", tmp_path / "checkpoint-60", marker=tmp_path / "ran")

    outcome, connections = ezmia_without_network(
        *gate(folder, "--json", "--trust-remote-code"), home=tmp_path / "home"
    )

    assert (tmp_path / "ran").exists()
    assert (outcome.returncode, connections) == (1, []), outcome.stderr
    assert json.loads(outcome.stdout)["verdict"] == "over_budget"
    for printed in ("printed by Python", "written by the system", "printed by C"):
        assert printed in outcome.stderr


def test_code_of_a_tokenizer_runs_only_where_that_is_allowed(gate, checkpoint, texts, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="TalkingTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_talking.TalkingTokenizer"]},
    )
    (folder / "tokenization_talking.py").write_text(
        f"import pathlib\nfrom transformers import PreTrainedTokenizerFast\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).write_text('ran')\n"
        "class TalkingTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    arguments = gate(checkpoint, "--tokenizer", folder, canaries=texts)

    outcome, _ = ezmia_without_network(*arguments, home=tmp_path / "home", answers="y\n" * 10)
    has_run = (tmp_path / "ran").exists()
    ezmia_without_network(*arguments, "--trust-remote-code", home=tmp_path / "home")

    assert not has_run
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert "runs only with --trust-remote-code" in outcome.stderr
    assert (tmp_path / "ran").exists()
