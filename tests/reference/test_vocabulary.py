"""Whether the reference and the model speak of the same vocabulary."""

import numpy as np
import peft
import pytest
from adapted_llama import LORA, draw, make_llama
from tiny import make_rows, make_texts
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ezmia_callbacks import PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.reference.vocabulary import (
    check_token_ids,
    explain_added_vocabulary,
    explain_other_vocabulary,
)
from ezmia_callbacks.scoring.rows import TokenRow

pytestmark = pytest.mark.filterwarnings(
    # PEFT warns of trained biases, of its own deprecations, and of adapters without a matching layer type.
    "ignore::UserWarning:peft.*",
    "ignore::FutureWarning",
)


def rows_of(*records):
    return [TokenRow(np.array(ids), np.array(ids)) for ids in records]


OLD_ROWS = rows_of([3, 4, 5], [6, 63])
NEW_ROWS = rows_of([3, 64, 5], [64, 65, 6, 7])


def enlarged(model, *, n_tokens=66):
    # As `tokenizer.add_special_tokens` and TRL's `clone_chat_template` ask for it.
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    return model


@pytest.fixture
def checkpoint(tmp_path):
    make_llama().save_pretrained(tmp_path)
    return tmp_path


ADAPTED = {
    "no_adapter": None,
    "lora": peft.LoraConfig(**LORA),
    "lora_on_embeddings": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "lm_head"]),
    "saved_embeddings": peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def adapted(model, name):
    return model if ADAPTED[name] is None else peft.get_peft_model(model, ADAPTED[name])


@pytest.mark.parametrize("name", ADAPTED)
def test_tokens_added_after_pretraining_are_counted_and_named(checkpoint, name):
    model = adapted(enlarged(LlamaForCausalLM.from_pretrained(checkpoint)), name)

    explanation = explain_added_vocabulary(model, NEW_ROWS)

    assert "enlarged from 64 to 66 after pre-training, and 3 of 7 canary tokens are new" in explanation
    assert "reference='auto', is the only reference for them" in explanation


@pytest.mark.parametrize("name", ADAPTED)
def test_added_tokens_that_no_canary_holds_are_not_worth_a_word(checkpoint, name):
    model = adapted(enlarged(LlamaForCausalLM.from_pretrained(checkpoint), n_tokens=128), name)

    assert explain_added_vocabulary(model, OLD_ROWS) is None


def test_the_vocabulary_of_pretraining_is_not_new(checkpoint):
    """Padding to a multiple was there in pre-training, and its ids are as old as the others."""
    assert explain_added_vocabulary(LlamaForCausalLM.from_pretrained(checkpoint), OLD_ROWS) is None
    enlarged(make_llama()).save_pretrained(checkpoint)
    assert explain_added_vocabulary(LlamaForCausalLM.from_pretrained(checkpoint), NEW_ROWS) is None


def test_a_wrapped_model_is_looked_into(checkpoint):
    wrapped = nn.Sequential(enlarged(LlamaForCausalLM.from_pretrained(checkpoint)))

    assert "enlarged from 64 to 66" in explain_added_vocabulary(wrapped, NEW_ROWS)


def test_where_no_configuration_can_be_found_nothing_is_said(checkpoint):
    gone = enlarged(LlamaForCausalLM.from_pretrained(checkpoint))
    (checkpoint / "config.json").unlink()

    assert explain_added_vocabulary(gone, NEW_ROWS) is None
    assert explain_added_vocabulary(enlarged(make_llama()), NEW_ROWS) is None
    assert explain_added_vocabulary(nn.Embedding(66, 4), NEW_ROWS) is None


def test_a_folder_of_weights_without_a_configuration_says_nothing_of_its_vocabulary(checkpoint):
    """The default of the class, 32,000 for a Llama, is not that of the model; GGUF weights lie like this."""
    model = enlarged(LlamaForCausalLM.from_pretrained(checkpoint), n_tokens=40_000)
    (checkpoint / "config.json").rename(checkpoint / "weights.gguf")
    ids = np.array([1, 2, 39_000])

    assert explain_added_vocabulary(model, [TokenRow(ids, ids)]) is None


def test_a_checkpoint_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    cached, commit = tmp_path / "models--someone--tiny", 40 * "0"
    make_llama().save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    model = enlarged(LlamaForCausalLM.from_pretrained("someone/tiny"))

    assert "enlarged from 64 to 66" in explain_added_vocabulary(model, NEW_ROWS)


def test_the_hub_itself_is_never_asked(checkpoint, monkeypatch):
    model = enlarged(LlamaForCausalLM.from_pretrained(checkpoint))
    asked = []

    def get_config_dict(name, **options):
        asked.append((name, options["local_files_only"]))
        raise OSError

    monkeypatch.setattr(LlamaConfig, "get_config_dict", get_config_dict)

    assert explain_added_vocabulary(model, NEW_ROWS) is None
    assert asked == [(str(checkpoint), True)]


@pytest.mark.parametrize("name", ADAPTED)
def test_a_reference_without_the_tokens_of_the_canaries_is_refused(name):
    reference = adapted(make_llama(), name)
    needed = r"3 tokens .* largest id is 65, .* has 64 embeddings.* use reference='auto'"

    with pytest.raises(ConfigurationError, match=needed):
        check_token_ids(reference, NEW_ROWS)


def test_a_reference_with_the_tokens_of_the_canaries_is_accepted():
    check_token_ids(make_llama(), OLD_ROWS)
    check_token_ids(enlarged(make_llama()), NEW_ROWS)
    check_token_ids(nn.Linear(2, 2), NEW_ROWS)


@pytest.mark.parametrize("name", ADAPTED)
def test_another_softmax_is_named(name):
    model = adapted(enlarged(make_llama()), name)

    explanation = explain_other_vocabulary(make_llama(), model)

    assert "reference runs over 64 entries and that of the model over 66: the surplus rows" in explanation
    assert "Use reference='auto'" in explanation


@pytest.mark.parametrize(
    ("n_reference", "n_model", "multiple"),
    [
        (50257, 50304, 64),  # GPT-2, padded
        (50304, 50277, 32),  # Pythia: its embeddings, and the tokens of its tokenizer
        (50257, 50259, None),
        (50304, 50306, None),
    ],
)
def test_a_vocabulary_padded_to_a_multiple_is_called_that(n_reference, n_model, multiple):
    class Head(nn.Module):
        def __init__(self, n_logits):
            super().__init__()
            self.get_output_embeddings = lambda: nn.Linear(1, n_logits, device="meta")

    explanation = explain_other_vocabulary(Head(n_reference), Head(n_model))

    assert f"reference runs over {n_reference} entries and that of the model over {n_model}" in explanation
    assert (f"padded to a multiple of {multiple};" in explanation) == (multiple is not None)
    assert ("surplus rows" in explanation) == (multiple is None)


@pytest.mark.parametrize("name", ADAPTED)
def test_the_same_softmax_is_not_worth_a_word(name):
    assert explain_other_vocabulary(make_llama(), adapted(make_llama(), name)) is None
    assert explain_other_vocabulary(nn.Linear(2, 2), make_llama()) is None


def canaries_with_new_tokens():
    """The records of `draw`, each with a token at its front that was added after pre-training."""
    records = [{"input_ids": [64, *row["input_ids"]]} for row in make_rows(make_texts(90))]
    return hold_out_canaries(records, n_members=20, n_non_members=30, seed=0)[1]


@pytest.mark.parametrize("reference", ["auto", "adapter", "copy"])
def test_added_tokens_are_named_before_the_first_step(checkpoint, reference, caplog):
    model = adapted(enlarged(LlamaForCausalLM.from_pretrained(checkpoint)), "lora")

    PrivacyAuditor(canaries_with_new_tokens(), reference=reference).begin(model)

    assert caplog.text.count("enlarged from 64 to 66 after pre-training, and 50 of 650 canary tokens") == 1


def test_a_reference_without_the_added_tokens_is_refused_before_the_first_step():
    auditor = PrivacyAuditor(canaries_with_new_tokens(), reference=make_llama)

    with pytest.raises(ConfigurationError, match="50 tokens of the canaries are not in the reference's"):
        auditor.begin(enlarged(make_llama()))


def test_a_reference_with_another_softmax_is_named_before_the_first_step(caplog):
    PrivacyAuditor(draw()[1], reference=make_llama()).begin(enlarged(make_llama()))

    assert caplog.text.count("The softmax of the reference runs over 64 entries") == 1
