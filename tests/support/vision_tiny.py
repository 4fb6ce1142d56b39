"""A tiny vision-language model with its processor, and chats about images; nothing is downloaded."""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tiny import VOCABULARY, make_texts, make_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl_tiny import assistant, user

SIZE = 16
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}<end> {% endfor %}"
)


def make_processor():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<user>", "<assistant>", "<end>"]})
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def make_vision_model(processor):
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(num_attention_heads=2, image_size=SIZE, patch_size=8, **layers),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            **layers,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config)


def make_vision_rows(n=80):
    """Chats of several lengths, each with an image of its own."""
    rng = np.random.default_rng(0)
    return Dataset.from_list(
        [
            {
                "images": [Image.fromarray(rng.integers(255, size=(SIZE, SIZE, 3), dtype=np.uint8))],
                "messages": [user(" ".join(text.split()[: 1 + i % 4])), assistant(text)],
            }
            for i, text in enumerate(make_texts(n, n_words=8))
        ]
    )
