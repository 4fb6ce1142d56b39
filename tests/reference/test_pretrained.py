import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.reference.pretrained import load_pretrained

INPUT_IDS = torch.arange(2, 20)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS)).logits


def drop_weights(folder, *names):
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_a_whole_checkpoint_loads_as_it_was_saved(shard_size, is_tied, tmp_path):
    model = make_model(tie_word_embeddings=is_tied)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)

    loaded = load_pretrained(str(tmp_path))

    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    assert torch.equal(logits(loaded), logits(model))


def test_the_body_alone_is_whole_where_the_head_is_tied_to_it(tmp_path):
    model = make_model()
    model.transformer.save_pretrained(tmp_path)

    assert torch.equal(logits(load_pretrained(str(tmp_path))), logits(model))


def test_weights_that_transformers_would_make_up_are_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    drop_weights(tmp_path, "transformer.h.0.ln_1.weight", "transformer.h.1.mlp.c_fc.weight")

    AutoModelForCausalLM.from_pretrained(tmp_path)  # has no objection
    with pytest.raises(
        ConfigurationError, match=r"missing: transformer\.h\.0\.ln_1\.weight and 1 more\. Save"
    ):
        load_pretrained(str(tmp_path))


def test_a_head_of_its_own_that_is_not_there_is_refused(tmp_path):
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    drop_weights(tmp_path, "lm_head.weight")

    with pytest.raises(ConfigurationError, match=r"weights are missing: lm_head\.weight\."):
        load_pretrained(str(tmp_path))
