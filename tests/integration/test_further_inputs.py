"""What training feeds besides token ids, and how it pads, reaches the model in audits, too."""

import further_inputs as fed
import numpy as np
import pytest
import torch
from huggingface_tiny import make_trainer
from lightning_tiny import TinyModule
from lightning_tiny import make_trainer as make_lightning_trainer
from tiny import make_model, make_rows, make_texts, make_tokenizer
from torch.utils.data import DataLoader
from transformers import Trainer

from ezmia_callbacks import (
    CanarySet,
    LeakageBudget,
    LightningPrivacyAuditCallback,
    PrivacyAuditCallback,
    hold_out_canaries,
    insert_canaries,
)
from ezmia_callbacks.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`:UserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*is not empty.*:UserWarning",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
    "ignore:.*ambiguous collection.*:UserWarning",
)

FORMS = [pytest.param(*form, id=name) for name, form in fed.FORMS.items()]


def stored_rows(rows, canaries):
    return [rows[int(record_id.removeprefix("row-"))] for record_id in canaries.record_ids]


def run_huggingface(path, rows, audit, *, model, collate, **arguments):
    settings = {"max_steps": 3, "remove_unused_columns": False} | arguments
    callbacks = [] if audit is None else [audit]
    trainer = make_trainer(path, rows, callbacks, model=model, collator=collate, **settings)
    trainer.train()
    return trainer


def run_lightning(path, rows, audit, *, model, collate):
    trainer = make_lightning_trainer(path, [audit], max_epochs=1)
    loader = DataLoader(rows, batch_size=8, collate_fn=collate)
    trainer.fit(TinyModule(model), loader, loader)


@pytest.mark.parametrize(("make", "make_rows", "collate"), FORMS)
def test_a_trainer_audits_the_loss_of_its_own_batches(tmp_path, make, make_rows, collate):
    rows = make_rows()
    train_rows, canaries = fed.draw(rows)
    audit, model = PrivacyAuditCallback(canaries), make()

    run_huggingface(tmp_path, train_rows, audit, model=model, collate=collate)

    expected = fed.losses_as_trained(model, stored_rows(rows, canaries), collate)
    np.testing.assert_allclose(fed.losses_as_audited(audit.auditor), expected, rtol=2e-5)
    assert len(audit.auditor.encoded.rows) == 45


@pytest.mark.parametrize(("make", "make_rows", "collate"), FORMS)
def test_lightning_audits_the_loss_of_its_own_batches(tmp_path, make, make_rows, collate):
    rows = make_rows()
    train_rows, canaries = fed.draw(rows)
    audit, model = LightningPrivacyAuditCallback(canaries), make()

    run_lightning(tmp_path, train_rows, audit, model=model, collate=collate)

    expected = fed.losses_as_trained(model, stored_rows(rows, canaries), collate)
    np.testing.assert_allclose(fed.losses_as_audited(audit.auditor), expected, rtol=2e-5)


@pytest.mark.parametrize(("make", "make_rows", "collate"), FORMS)
def test_canaries_drawn_from_the_trainer_are_fed_as_its_own_batches_are(tmp_path, make, make_rows, collate):
    rows = make_rows()
    train_rows, eval_rows = rows[::2], rows[1::2]
    audit, model = PrivacyAuditCallback(n_members=20, n_non_members=20), make()

    trainer = run_huggingface(
        tmp_path, train_rows, audit, model=model, collate=collate, eval_dataset=eval_rows
    )

    by_name = {"train_dataset": train_rows, "eval_dataset": eval_rows}
    stored = [
        by_name[name][int(number)]
        for name, number in (record_id.rsplit("-", 1) for record_id in audit.auditor.encoded.record_ids)
    ]
    expected = fed.losses_as_trained(trainer.model, stored, collate)
    np.testing.assert_allclose(fed.losses_as_audited(audit.auditor), expected, rtol=2e-5)


@pytest.mark.parametrize(
    "collate",
    [
        pytest.param(fed.collator(side="right"), id="right padding"),
        pytest.param(fed.collator(side="right", padding="max_length"), id="right padding to one length"),
        pytest.param(fed.collator(side="right", extra=fed.plain_positions), id="positions from 0"),
        pytest.param(fed.collator(extra=fed.plain_positions), id="left padding, positions from 0"),
    ],
)
def test_what_changes_nothing_is_not_fed(tmp_path, collate):
    rows, canaries = fed.draw(fed.make_mixed_rows())
    audit = PrivacyAuditCallback(canaries)

    run_huggingface(tmp_path, rows, audit, model=make_model(), collate=collate)

    encoded = audit.auditor.encoded
    assert (encoded.input_names, encoded.padding_side) == (frozenset(), "right")
    assert not any(row.has_further_inputs for row in encoded.rows)
    assert [row.input_ids.tolist() for row in encoded.rows] == [row["input_ids"] for row in canaries.records]


@pytest.mark.parametrize(
    ("form", "names", "side"),
    [
        ("left padding", set(), "left"),
        ("token types", {"token_type_ids"}, "right"),
        ("token types, left padding", {"token_type_ids"}, "left"),
        ("positions", {"position_ids"}, "right"),
        ("images", {"pixel_values"}, "right"),
    ],
)
def test_what_is_fed_besides_is_named(tmp_path, form, names, side):
    make, make_rows, collate = fed.FORMS[form]
    rows, canaries = fed.draw(make_rows())
    audit = PrivacyAuditCallback(canaries)

    run_huggingface(tmp_path, rows, audit, model=make(), collate=collate)

    assert (audit.auditor.encoded.input_names, audit.auditor.encoded.padding_side) == (names, side)


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda: make_model(dropout=0.2), "left padding"),
        (fed.SeesImages, "images"),
        (fed.make_dynamic_llama, "token types"),
    ],
    ids=["left padding", "images", "positions that grow with the longest row"],
)
def test_training_is_the_same_to_the_last_bit_with_and_without_an_audit(tmp_path, make, form):
    _, make_rows, collate = fed.FORMS[form]
    rows, canaries = fed.draw(make_rows())

    def train(audit):
        model = make()
        return run_huggingface(tmp_path, rows, audit, model=model, collate=collate).model.state_dict()

    audited = train(PrivacyAuditCallback(canaries, every=1))

    for name, weights in train(None).items():
        assert torch.equal(weights, audited[name]), name


def test_the_same_random_images_are_made_at_each_audit(tmp_path):
    make, make_rows, collate = fed.FORMS["images"]
    rows, canaries = fed.draw(make_rows())
    audit = PrivacyAuditCallback(canaries, every=1)

    run_huggingface(tmp_path, rows, audit, model=make(), collate=collate, learning_rate=0.0)

    assert len({result.non_member_loss for result in audit.history}) == 1


@pytest.mark.parametrize("form", ["left padding", "images"])
def test_a_subset_is_fed_as_all_canaries_are(tmp_path, form):
    make, make_rows, collate = fed.FORMS[form]
    rows, canaries = fed.draw(make_rows())
    audit, model = PrivacyAuditCallback(canaries), make()
    run_huggingface(tmp_path, rows, audit, model=model, collate=collate)
    auditor = audit.auditor
    everything = fed.losses_as_audited(auditor)
    is_chosen = np.arange(len(everything)) % 3 == 0

    subset = auditor.encoded.select(is_chosen)
    target = auditor._scorer.statistics(model, subset.rows)

    np.testing.assert_allclose(
        [-target.log_probs[a:b].mean() for a, b in zip(target.offsets, target.offsets[1:], strict=False)],
        everything[is_chosen],
        rtol=2e-5,
    )


def test_the_same_words_about_another_image_are_another_record(tmp_path):
    make, _, collate = fed.FORMS["images"]
    some = fed.make_image_rows()
    words = {name: some[0][name] for name in ("input_ids", "attention_mask")}
    rows = [words | {"image": row["image"]} for row in some]
    audit = PrivacyAuditCallback(n_members=20, n_non_members=20)

    run_huggingface(tmp_path, rows[:40], audit, model=make(), collate=collate, eval_dataset=rows[40:])

    assert (audit.auditor.encoded.n_members, audit.auditor.encoded.n_non_members) == (20, 20)


def test_canaries_that_lack_the_images_of_training_are_refused_under_a_budget(tmp_path):
    rows, canaries = fed.draw(fed.make_image_rows())
    without = CanarySet(canaries.records, canaries.is_member, canaries.record_ids, canaries.provenance)

    def collate(batch):
        extra = fed.images if "image" in batch[0] else None
        return fed.collator(side="right", extra=extra)(batch)

    audit = PrivacyAuditCallback(without, budget=LeakageBudget(limit=0.9, rule="point"))
    with pytest.raises(ConfigurationError, match="returns `pixel_values`, and for the canaries it does not"):
        run_huggingface(tmp_path, rows, audit, model=fed.SeesImages(), collate=collate)


class TakesTokens(fed.SeesImages):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, None, labels)


class PopsImages(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs.pop("pixel_values")
        return model(**inputs).loss


def test_an_input_that_the_model_does_not_take_is_refused_under_a_budget(tmp_path):
    _, make_rows, collate = fed.FORMS["images"]
    rows, canaries = fed.draw(make_rows())
    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.9, rule="point"))

    with pytest.raises(ConfigurationError, match="returns `pixel_values`, which cannot be handed"):
        run_huggingface(tmp_path, rows, audit, model=TakesTokens(), collate=collate, trainer_class=PopsImages)


def test_an_input_that_the_model_does_not_take_is_named_without_a_budget(tmp_path, caplog):
    _, make_rows, collate = fed.FORMS["images"]
    rows, canaries = fed.draw(make_rows())
    audit = PrivacyAuditCallback(canaries)

    run_huggingface(tmp_path, rows, audit, model=TakesTokens(), collate=collate, trainer_class=PopsImages)

    assert "returns `pixel_values`, which cannot be handed to the model" in caplog.text
    assert "scored WITHOUT" in caplog.text
    assert audit.auditor.encoded.input_names == frozenset()
    assert audit.history[-1].status == "ok"


def plain_logits(pl_module, input_ids, attention_mask):
    return pl_module.model(input_ids=input_ids, attention_mask=attention_mask).logits


def logits_with_inputs(pl_module, input_ids, attention_mask, **inputs):
    return pl_module.model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits


def test_a_logits_fn_that_takes_no_further_inputs_is_refused_under_a_budget(tmp_path):
    make, make_rows, collate = fed.FORMS["token types"]
    rows, canaries = fed.draw(make_rows())
    budget = LeakageBudget(limit=0.9, rule="point")
    audit = LightningPrivacyAuditCallback(canaries, budget=budget, logits_fn=plain_logits)

    with pytest.raises(ConfigurationError, match="returns `token_type_ids`, which cannot be handed"):
        run_lightning(tmp_path, rows, audit, model=make(), collate=collate)


def test_a_logits_fn_that_takes_inputs_is_handed_them(tmp_path):
    make, make_rows, collate = fed.FORMS["token types"]
    rows = make_rows()
    train_rows, canaries = fed.draw(rows)
    audit, model = LightningPrivacyAuditCallback(canaries, logits_fn=logits_with_inputs), make()

    run_lightning(tmp_path, train_rows, audit, model=model, collate=collate)

    expected = fed.losses_as_trained(model, stored_rows(rows, canaries), collate)
    np.testing.assert_allclose(fed.losses_as_audited(audit.auditor), expected, rtol=2e-5)


def test_rows_longer_than_the_configuration_says_are_scored_where_the_model_takes_them(tmp_path):
    rows = fed.make_mixed_rows()
    train_rows, canaries = fed.draw(rows)
    audit, model = PrivacyAuditCallback(canaries, batch_size=1), fed.make_dynamic_llama()
    collate = fed.collator(side="right")

    run_huggingface(tmp_path, train_rows, audit, model=model, collate=collate)

    # Each alone, for the scaling goes by the longest row of a batch.
    stored = stored_rows(rows, canaries)
    expected = [fed.losses_as_trained(model, [row], collate)[0] for row in stored]
    np.testing.assert_allclose(fed.losses_as_audited(audit.auditor), expected, rtol=2e-5)


def test_names_that_only_the_script_reads_are_not_handed_to_a_model_that_takes_any(tmp_path, caplog):
    def names(rows, batch):
        return {"source": [f"file {len(row['input_ids'])}" for row in rows]}

    class PopsNames(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            inputs.pop("source")
            return model(**inputs).loss

    rows, canaries = fed.draw(fed.make_mixed_rows())
    audit = PrivacyAuditCallback(canaries)
    collate = fed.collator(side="right", extra=names)

    run_huggingface(tmp_path, rows, audit, model=make_model(), collate=collate, trainer_class=PopsNames)

    assert "returns `source`, which cannot be handed to the model" in caplog.text
    assert audit.history[-1].status == "ok"


class HidesItsHead(fed.SeesImages):
    get_output_embeddings = None


def test_images_that_a_model_around_the_language_model_sees_are_not_swallowed_by_it(tmp_path):
    _, make_rows, collate = fed.FORMS["images"]
    rows, canaries = fed.draw(make_rows())
    budget = LeakageBudget(limit=0.9, rule="point")
    audit = LightningPrivacyAuditCallback(canaries, budget=budget)

    with pytest.raises(ConfigurationError, match="returns `pixel_values`, which cannot be handed"):
        run_lightning(tmp_path, rows, audit, model=HidesItsHead(), collate=collate)


def stored_token_types(rows, batch):
    """From a column of the rows, where they have it."""
    found = torch.zeros_like(batch["input_ids"])
    for i, row in enumerate(rows):
        found[i, : len(row["token_type_ids"])] = torch.tensor(row["token_type_ids"])
    return {"token_type_ids": found}


def test_inserted_canaries_are_fed_with_all_columns_of_the_training_rows(tmp_path):
    rows = [row | {"token_type_ids": [0] * len(row["input_ids"])} for row in make_rows(make_texts(400))]
    train_rows, canaries = insert_canaries(rows, n_canaries=60, length=8, max_fraction=0.2)
    audit = PrivacyAuditCallback(canaries)
    collate = fed.collator(side="right", extra=stored_token_types)

    run_huggingface(tmp_path, train_rows, audit, model=make_model(), collate=collate)

    assert audit.auditor.encoded.input_names == {"token_type_ids"}


def test_a_text_has_the_token_types_that_the_tokenizer_gives_the_training_rows(tmp_path):
    class TwoTypes(type(make_tokenizer())):
        def __call__(self, text, **options):
            encoded = super().__call__(text, **options)
            if isinstance(text, str):
                encoded["token_type_ids"] = [i % 2 for i in range(len(encoded["input_ids"]))]
            return encoded

    tokenizer = make_tokenizer()
    tokenizer.__class__ = TwoTypes
    texts, canaries = hold_out_canaries(make_texts(90), n_members=20, n_non_members=25, seed=0)
    rows = [dict(tokenizer(text)) for text in texts]
    audit = PrivacyAuditCallback(canaries)
    collate = fed.collator(side="right", extra=stored_token_types)
    trainer = make_trainer(
        tmp_path, rows, [audit], collator=collate, max_steps=1, remove_unused_columns=False
    )
    trainer.processing_class = tokenizer

    trainer.train()

    found = audit.auditor.encoded.rows[0].inputs["token_type_ids"]
    assert found.tolist() == [i % 2 for i in range(12)]


def test_positions_that_begin_anew_in_rows_of_several_records_are_none_that_a_canary_lacks(tmp_path):
    rows, canaries = fed.draw(fed.make_mixed_rows())
    packed = [
        {
            "input_ids": [*first["input_ids"], *second["input_ids"]],
            "position_ids": [*range(len(first["input_ids"])), *range(len(second["input_ids"]))],
        }
        for first, second in zip(rows[::2], rows[1::2], strict=False)
    ]

    def collate(batch):
        extra = fed.stored_positions if "position_ids" in batch[0] else fed.plain_positions
        return fed.collator(side="right", extra=extra)(batch)

    audit = PrivacyAuditCallback(canaries, budget=LeakageBudget(limit=0.9, rule="point"))
    run_huggingface(tmp_path, packed, audit, model=make_model(), collate=collate)

    assert audit.auditor.encoded.input_names == frozenset()
