"""Chats about images under TRL: scored with their images, as they are trained."""

import numpy as np
import pytest
import torch

trl = pytest.importorskip("trl")
vision_tiny = pytest.importorskip("vision_tiny")

from packaging.version import Version  # noqa: E402
from trl_tiny import make_sft  # noqa: E402

from ezmia_callbacks import PrivacyAuditCallback, hold_out_canaries  # noqa: E402

pytestmark = [
    pytest.mark.skipif(Version(trl.__version__) < Version("1.0"), reason="its trainer takes no images"),
    pytest.mark.filterwarnings(
        "ignore:.*pin_memory.*:UserWarning", "ignore:.*will be removed in.*:FutureWarning"
    ),
]


@pytest.mark.parametrize("is_drawn", [False, True], ids=["held out", "drawn from the trainer"])
def test_chats_about_images_are_scored_with_their_images(tmp_path, is_drawn):
    rows = vision_tiny.make_vision_rows()
    if is_drawn:
        sides = {"train_dataset": rows.select(range(40)), "eval_dataset": rows.select(range(40, 80))}
        audit = PrivacyAuditCallback(n_members=20, n_non_members=20)
        train_rows, arguments = sides["train_dataset"], {"eval_dataset": sides["eval_dataset"]}
    else:
        train_rows, canaries = hold_out_canaries(rows, n_members=20, n_non_members=20, seed=0)
        sides, arguments = {"row": rows}, {}
        audit = PrivacyAuditCallback(canaries)
    processor = vision_tiny.make_processor()
    model = vision_tiny.make_vision_model(processor)
    config = {"max_length": None, "max_steps": 2}

    trainer = make_sft(
        tmp_path, train_rows, [audit], model=model, tokenizer=processor, config=config, **arguments
    )
    trainer.train()

    encoded, target = audit.auditor.encoded, audit.auditor.target
    assert "pixel_values" in encoded.input_names
    model.eval()
    for i, record_id in enumerate(encoded.record_ids):
        name, number = record_id.rsplit("-", 1)
        batch = trainer.data_collator([dict(sides[name][int(number)])])
        with torch.no_grad():
            expected = model(**batch).loss.item()
        found = -target.log_probs[target.offsets[i] : target.offsets[i + 1]].mean()
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(np.unique(target.offsets)) == 41
