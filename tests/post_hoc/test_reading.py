"""Which tokenizer reads the canaries of an audit afterwards."""

import shutil

import pytest
from post_hoc_runs import BATCH_SIZE, as_texts, permute_vocabulary
from tiny import make_tokenizer

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.post_hoc import audit_checkpoints, find_checkpoints
from ezmia_callbacks.report import summarize

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def as_chats(canaries):
    return as_texts(canaries, lambda text: {"messages": [{"role": "user", "content": text}]})


@pytest.fixture
def checkpoint(run, tmp_path):
    """The last checkpoint, in a folder of its own."""
    shutil.copytree(run.folder / "checkpoint-60", tmp_path / "checkpoint-60")
    return tmp_path / "checkpoint-60"


def audited(checkpoint, canaries, run, **options):
    options = {"base": run.base, "batch_size": BATCH_SIZE, "device": "cpu", **options}
    return audit_checkpoints(find_checkpoints(checkpoint), canaries, **options)


def auc(history):
    return history[-1].metrics["auc"].value


def test_a_checkpoint_that_reads_the_canaries_otherwise_is_refused(checkpoint, run):
    permute_vocabulary(checkpoint)

    with pytest.raises(
        ConfigurationError, match=r"checkpoint-60 makes other tokens of 100 of 100\. Choose with --tokenizer"
    ):
        audited(checkpoint, as_texts(run.canaries), run)


def test_the_tokenizer_of_the_base_measures_what_training_fed(checkpoint, run):
    permute_vocabulary(checkpoint)

    history = audited(checkpoint, as_texts(run.canaries), run, tokenizer="base")

    assert auc(history) == run.history[-1].metrics["auc"].value
    (finding,) = [f for f in history.findings if f.name == "tokenizers differ"]
    assert finding.text == (
        "The canaries were read with the tokenizer of the base: that of checkpoint-60 makes other tokens of "
        "100 of 100."
    )
    assert finding.text in summarize(history)


def test_the_checkpoint_decides_only_where_that_is_asked_for_and_it_is_said(checkpoint, run):
    permute_vocabulary(checkpoint)

    history = audited(checkpoint, as_texts(run.canaries), run, tokenizer="checkpoint")

    assert auc(history) < run.history[-1].metrics["auc"].value - 0.05
    assert "that of the base makes other tokens of 100 of 100" in history.findings[-1].text
    assert history.run_metadata.tokenizer == "the tokenizer of checkpoint-60"


def test_a_folder_can_be_named(checkpoint, run, tmp_path):
    permute_vocabulary(checkpoint)
    make_tokenizer().save_pretrained(tmp_path / "trained_with")

    history = audited(checkpoint, as_texts(run.canaries), run, tokenizer=tmp_path / "trained_with")

    assert auc(history) == run.history[-1].metrics["auc"].value
    assert [f for f in history.findings if f.name == "tokenizers differ"] == []


def test_words_that_were_added_and_are_in_no_canary_change_nothing(checkpoint, run):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(checkpoint)

    assert auc(audited(checkpoint, as_texts(run.canaries), run)) == run.history[-1].metrics["auc"].value


def test_words_that_were_added_and_are_in_canaries_are_named(checkpoint, run):
    texts = as_texts(run.canaries).records
    phrase = " ".join(texts[0].split()[:2])
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([phrase])
    tokenizer.save_pretrained(checkpoint)
    n_changed = sum(phrase in text for text in texts)

    with pytest.raises(ConfigurationError, match=rf"other tokens of {n_changed} of 100"):
        audited(checkpoint, as_texts(run.canaries), run)
    assert 0 < n_changed < 100


def test_token_ids_need_no_tokenizer(checkpoint, run):
    (checkpoint / "tokenizer.json").write_text("{")

    history = audited(checkpoint, run.canaries, run)

    assert auc(history) == run.history[-1].metrics["auc"].value
    assert history.run_metadata.tokenizer is None


def test_the_tokenizers_of_all_checkpoints_are_looked_at(run, tmp_path):
    for step in (45, 60):
        shutil.copytree(run.folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    permute_vocabulary(tmp_path / "checkpoint-45")

    with pytest.raises(ConfigurationError, match="that of checkpoint-45 makes other tokens"):
        audited(tmp_path, as_texts(run.canaries), run)
    with pytest.raises(
        ConfigurationError, match="read with the tokenizer of checkpoint-60: that of checkpoint-45"
    ):
        audited(tmp_path, as_texts(run.canaries), run, tokenizer="checkpoint")


def test_the_tokenizer_of_a_twin_is_looked_at(run, tmp_path):
    shutil.copytree(run.folder / "checkpoint-60", tmp_path / "run")
    shutil.copytree(run.folder / "checkpoint-60", tmp_path / "run" / "checkpoint-60")
    permute_vocabulary(tmp_path / "run")

    with pytest.raises(ConfigurationError, match="that of run makes other tokens"):
        audited(tmp_path / "run", as_texts(run.canaries), run)


def test_a_base_without_a_tokenizer_leaves_the_choice_to_the_user(checkpoint, run, tmp_path):
    shutil.copytree(run.base, tmp_path / "base")
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()

    with pytest.raises(ConfigurationError, match=r"cannot be loaded as a tokenizer.*--tokenizer"):
        audited(checkpoint, as_texts(run.canaries), run, base=tmp_path / "base")
    history = audited(checkpoint, as_texts(run.canaries), run, base=tmp_path / "base", tokenizer="checkpoint")
    assert auc(history) == run.history[-1].metrics["auc"].value


def test_a_checkpoint_without_a_tokenizer_is_read_with_that_of_the_base(checkpoint, run):
    for path in checkpoint.glob("*token*"):
        path.unlink()

    assert auc(audited(checkpoint, as_texts(run.canaries), run)) == run.history[-1].metrics["auc"].value
    with pytest.raises(ConfigurationError, match="No checkpoint has a tokenizer of its own"):
        audited(checkpoint, as_texts(run.canaries), run, tokenizer="checkpoint")


def test_a_tokenizer_that_cannot_be_loaded_is_not_taken_for_the_same(checkpoint, run):
    (checkpoint / "tokenizer.json").write_text("{")

    with pytest.raises(ConfigurationError, match="that of checkpoint-60 cannot be compared with it"):
        audited(checkpoint, as_texts(run.canaries), run)
    assert auc(audited(checkpoint, as_texts(run.canaries), run, tokenizer="base")) > 0.5


def test_chats_are_not_read_with_a_template_that_only_the_checkpoint_has(checkpoint, run):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(checkpoint)

    with pytest.raises(
        ConfigurationError,
        match=r"cannot be read with the tokenizer of the base \(\w+ in \S*template.*\)\. .*--tokenizer",
    ):
        audited(checkpoint, as_chats(run.canaries), run)

    history = audited(checkpoint, as_chats(run.canaries), run, tokenizer="checkpoint")
    assert "that of the base cannot read them" in history.findings[-1].text
    assert auc(history) == run.history[-1].metrics["auc"].value


def test_a_template_that_hides_the_canaries_is_found(checkpoint, run, tmp_path):
    shutil.copytree(run.base, tmp_path / "base")
    for folder, template in (
        (tmp_path / "base", TEMPLATE),
        (checkpoint, TEMPLATE.replace("content", "role")),
    ):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)

    with pytest.raises(ConfigurationError, match="that of checkpoint-60 cannot read them"):
        audited(checkpoint, as_chats(run.canaries), run, base=tmp_path / "base")
