"""Which base a checkpoint is compared with."""

import re
import shutil

import pytest
from adapters import edit_json, save_adapter, save_base
from post_hoc_runs import BATCH_SIZE
from tiny import make_model

from ezmia_callbacks import AuditHistory, LeakageBudget
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.post_hoc import audit_checkpoints, find_checkpoints
from ezmia_callbacks.report import summarize, to_document

pytestmark = pytest.mark.filterwarnings(
    # PEFT asks transformers 5 by the old name.
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    # PEFT looks for the base's configuration to see whether the vocabulary grew.
    "ignore:Could not find a config file:UserWarning",
)


def audited(folder, canaries, **options):
    checkpoints = find_checkpoints(folder)
    return audit_checkpoints(checkpoints, canaries, **{"batch_size": BATCH_SIZE, "device": "cpu", **options})


def figures(history):
    return [(r.metrics["auc"].value, r.member_loss, r.non_member_loss) for r in history.audits_after_baseline]


@pytest.fixture
def two_bases(tmp_path):
    """A run whose second adapter names another base than the first."""
    bases = [save_base(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("two", 7))]
    for step, base in zip((1, 2), bases, strict=True):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", base=base, seed=step)
    return tmp_path / "run", bases


def test_each_adapter_is_compared_with_the_base_that_it_names(two_bases, run, tmp_path):
    folder, bases = two_bases
    alone = [audited(folder / f"checkpoint-{step}", run.canaries) for step in (1, 2)]

    history = audited(
        folder, run.canaries, output_dir=tmp_path / "out", budget=LeakageBudget(limit=0.9, rule="point")
    )

    assert figures(history) == [figure for one in alone for figure in figures(one)]
    assert [r.decision.is_within_budget for r in history] == [True, True, True]
    assert history.run_metadata.base_model == f"{bases[0]}; {bases[1]}"
    assert history.run_metadata.n_checkpoints == 2
    about = [[f.text for f in r.findings if f.name == "base"] for r in history]
    assert about == [[], *([f"Compared with the base that its adapter names, {base}."] for base in bases)]
    assert all(str(base) in summarize(history) for base in bases)
    saved = AuditHistory.load(tmp_path / "out" / "history.jsonl")
    assert saved.to_dicts() == history.to_dicts()
    assert saved.is_complete


def test_the_error_rate_is_shared_by_the_audits_of_all_bases(two_bases, run):
    history = audited(two_bases[0], run.canaries)

    # Two audits, and four scores that are judged together.
    assert {r.metrics["auc"].band.confidence for r in history.audits_after_baseline} == {1 - 0.05 / (2 * 4)}


def test_a_base_that_contradicts_the_adapter_is_refused_unless_it_is_meant(two_bases, run):
    folder, (one, _) = two_bases

    with pytest.raises(
        ConfigurationError, match=r"names '.*two' as its base, and '.*one' was given: .*allow"
    ):
        audited(folder, run.canaries, base=one)

    forced = audited(folder, run.canaries, base=one, allow_other_base=True)
    alone = audited(folder / "checkpoint-1", run.canaries)
    assert figures(forced)[0] == figures(alone)[0]
    assert forced.run_metadata.base_model == str(one)


def test_a_copy_of_the_base_that_an_adapter_names_is_that_base(two_bases, run, tmp_path):
    folder, (one, _) = two_bases
    shutil.copytree(one, tmp_path / "copy")

    copied = audited(folder / "checkpoint-1", run.canaries, base=tmp_path / "copy")

    assert figures(copied) == figures(audited(folder / "checkpoint-1", run.canaries))


@pytest.mark.parametrize("named", [None, "", "/nowhere/base", "some-org/some-base", 7])
def test_a_base_that_is_missing_is_an_error_before_anything_is_audited(named, two_bases, run, monkeypatch):
    folder, _ = two_bases
    edit_json(folder / "checkpoint-2" / "adapter_config.json", base_model_name_or_path=named)
    monkeypatch.setattr("ezmia_callbacks.post_hoc.models.Loader.load_base", None)

    with pytest.raises(ConfigurationError, match=re.escape("checkpoint-2")) as caught:
        audited(folder, run.canaries)

    assert "--base" in str(caught.value)


def test_a_base_that_is_the_adapter_itself_is_refused(two_bases, run):
    folder, _ = two_bases
    path = folder / "checkpoint-2"
    edit_json(path / "adapter_config.json", base_model_name_or_path=str(path))

    with pytest.raises(ConfigurationError, match="are the same folder"):
        audited(folder, run.canaries)


def test_named_adapters_are_audited(run, tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "run" / "checkpoint-1", base=base, names=("default", "other"))

    history = audited(tmp_path / "run", run.canaries)

    assert len(set(figures(history))) == 2


def test_a_base_with_another_vocabulary_is_named(run, tmp_path):
    base = save_base(tmp_path / "base")
    make_model(vocab_size=70, seed=3).save_pretrained(tmp_path / "checkpoint-1")

    history = audited(tmp_path, run.canaries, base=base)

    (finding,) = [f for f in history[1].findings if f.name == "vocabulary"]
    assert (
        f"The softmax of the base {str(base)!r} runs over 64 entries and that of the checkpoint over 70"
        in (finding.text)
    )
    assert finding.text in [f["text"] for f in to_document(history)["runs"][0]["audits"][1]["findings"]]


def test_an_adapter_of_another_shape_says_which_weights_and_what_to_do(run, tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "checkpoint-1", base=base, n_embd=16)

    with pytest.raises(
        ConfigurationError, match=r"size mismatch for .*lora_A.*16.*32.*Is it the base that the adapter was"
    ):
        audited(tmp_path, run.canaries)


def test_a_checkpoint_of_another_shape_says_which_weights_and_what_to_do(run, tmp_path):
    base = save_base(tmp_path / "base")
    make_model(vocab_size=70).save_pretrained(tmp_path / "checkpoint-1")
    edit_json(tmp_path / "checkpoint-1" / "config.json", vocab_size=64)

    with pytest.raises(
        ConfigurationError,
        match=r"size mismatch: transformer\.wte\.weight has the shape \[70, 32\].*\[64, 32\]",
    ):
        audited(tmp_path, run.canaries, base=base)
