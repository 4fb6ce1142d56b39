import json
import logging
import shutil

import numpy as np
import pytest
import torch
from post_hoc_runs import BATCH_SIZE, N_EPOCHS, finish_run
from tiny import make_model, make_texts, make_tokenizer

from ezmia_callbacks import AuditHistory, CanarySet, LeakageBudget
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.post_hoc import audit_checkpoints, find_checkpoints
from ezmia_callbacks.post_hoc.models import Loader
from ezmia_callbacks.report import to_document

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own data loader and by accelerate on a machine without an accelerator.
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*torch.cpu.amp.autocast.*:FutureWarning",
    # PEFT asks transformers 5 by the old name.
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    # PEFT looks for the base's configuration to see whether the vocabulary grew.
    "ignore:Could not find a config file:UserWarning",
    # Newer releases of PEFT warn of what the audit refuses.
    "ignore:Found missing adapter keys:UserWarning",
)


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory):
    return finish_run(tmp_path_factory.mktemp("mixed"), is_mixed=True)


@pytest.fixture(scope="module")
def curve(run):
    return audited(run)


def audited(run, **options):
    options = {"base": run.base, "batch_size": BATCH_SIZE, "device": "cpu", **options}
    return audit_checkpoints(find_checkpoints(run.folder), run.canaries, **options)


def figures(history):
    """All that was measured; how long it took is not, nor what was fed when, which no checkpoint tells."""
    unknown = {"seconds": 0.0, "overhead": None, "n_members_seen": None, "auc_recent": None}
    # An adapter's weights before the first step are in no checkpoint: there it is the base that is audited.
    return [
        {**result.to_dict(), **unknown, **({"weights": ""} if result.is_baseline else {})}
        for result in history
    ]


def copy_of(run, path):
    shutil.copytree(run.folder, path / "run")
    return path / "run"


def check_same_to_the_last_bit(curve, run):
    assert len(curve) == N_EPOCHS + 1
    assert figures(curve) == figures(run.history)
    for after, during in zip(curve, run.history, strict=True):
        np.testing.assert_array_equal(after.scores, during.scores)


def test_the_curve_is_the_one_that_the_callback_wrote_to_the_last_bit(run, curve):
    check_same_to_the_last_bit(curve, run)


def test_the_curve_of_adapters_is_the_one_that_the_callback_wrote_to_the_last_bit(adapter_run):
    check_same_to_the_last_bit(audited(adapter_run), adapter_run)


def test_the_curve_of_a_run_in_mixed_precision_needs_the_same_to_the_last_bit(mixed_run):
    assert figures(audited(mixed_run)) != figures(mixed_run.history)
    check_same_to_the_last_bit(audited(mixed_run, dtype="bfloat16-mixed"), mixed_run)


def test_the_curve_tells_checkpoints_apart(curve):
    assert len({result.member_loss for result in curve}) == N_EPOCHS + 1


def test_checkpoints_come_in_the_order_of_their_steps(run):
    checkpoints = find_checkpoints(run.folder)

    assert [c.step for c in checkpoints] == [15, 30, 45, 60]
    assert [c.epoch for c in checkpoints] == [1.0, 2.0, 3.0, 4.0]


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (100, 20, 3):
        make_folder_of_model(tmp_path / f"checkpoint-{step}")

    assert [c.step for c in find_checkpoints(tmp_path)] == [3, 20, 100]


def make_folder_of_model(path):
    path.mkdir()
    (path / "config.json").write_text("{}")


def test_a_final_model_that_repeats_a_checkpoint_is_audited_once(run):
    assert (run.folder / "model.safetensors").is_file()
    assert run.folder not in [c.path for c in find_checkpoints(run.folder)]


def test_a_final_model_of_its_own_is_the_last_point(run, tmp_path):
    folder = copy_of(run, tmp_path)
    make_model(seed=9).save_pretrained(folder)

    assert [c.path.name for c in find_checkpoints(folder)][-2:] == ["checkpoint-60", "run"]
    assert find_checkpoints(folder)[-1].step == 60


def test_one_checkpoint_is_a_curve_of_one_point(run):
    (checkpoint,) = find_checkpoints(run.folder / "checkpoint-30")

    history = audit_checkpoints(
        [checkpoint], run.canaries, base=run.base, batch_size=BATCH_SIZE, device="cpu"
    )

    assert [(r.step, r.epoch) for r in history] == [(0, 0.0), (30, 2.0)]
    assert history[1].metrics["auc"].value == run.history[2].metrics["auc"].value


def test_an_adapter_names_its_own_base(adapter_run, tmp_path):
    folder = copy_of(adapter_run, tmp_path)
    for path in folder.rglob("adapter_config.json"):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(adapter_run.base)})
        )

    history = audit_checkpoints(
        find_checkpoints(folder), adapter_run.canaries, batch_size=BATCH_SIZE, device="cpu"
    )

    assert figures(history) == figures(adapter_run.history)


def test_a_full_checkpoint_needs_a_base(run):
    with pytest.raises(ConfigurationError, match="does not say which model it was trained from"):
        audited(run, base=None)


def test_the_base_cannot_be_the_checkpoint(run):
    with pytest.raises(ConfigurationError, match="are the same folder"):
        audited(run, base=run.folder / "checkpoint-30")


def test_an_adapter_that_does_not_fit_its_base_is_no_clean_model(adapter_run, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter_run.folder / "checkpoint-30", tmp_path / "checkpoint-30")
    file = tmp_path / "checkpoint-30" / "adapter_model.safetensors"
    renamed = {name.replace("c_attn", "qkv"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})

    with pytest.raises(ConfigurationError, match="does not fit its base"):
        audit_checkpoints(
            find_checkpoints(tmp_path), adapter_run.canaries, base=adapter_run.base, device="cpu"
        )


def test_a_checkpoint_with_missing_weights_is_refused(run, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(run.folder / "checkpoint-30", tmp_path / "checkpoint-30")
    file = tmp_path / "checkpoint-30" / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(ConfigurationError, match=r"weights are missing: .*h\.1\.mlp"):
        audit_checkpoints(find_checkpoints(tmp_path), run.canaries, base=run.base, device="cpu")


def test_one_damaged_checkpoint_leaves_a_gap(run, tmp_path, caplog):
    folder = copy_of(run, tmp_path)
    (folder / "checkpoint-30" / "model.safetensors").write_bytes(b"half of a file")

    history = audit_checkpoints(
        find_checkpoints(folder),
        run.canaries,
        base=run.base,
        batch_size=BATCH_SIZE,
        device="cpu",
        output_dir=tmp_path / "out",
    )

    assert [r.status for r in history] == ["ok", "ok", "failed", "ok", "ok"]
    assert history[2].decision.is_within_budget is None
    assert "checkpoint-30 could not be audited" in caplog.text
    # Who holds every checkpoint lacks this one.
    assert [r.n_checkpoints for r in history] == [None, None, None, 2, 3]
    of_all = dict.fromkeys(("checkpoint_holder", "checkpoint_holder_epsilon", "n_checkpoints"))
    found, expected = ([row | of_all for row in figures(each)[3:]] for each in (history, run.history))
    assert found == expected
    assert [r.status for r in AuditHistory.load(tmp_path / "out" / "history.jsonl")] == [
        r.status for r in history
    ]


def test_a_diverged_checkpoint_leaves_a_gap(run, tmp_path):
    folder = copy_of(run, tmp_path)
    model = make_model()
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    model.save_pretrained(folder / "checkpoint-30")

    history = audit_checkpoints(find_checkpoints(folder), run.canaries, base=run.base, device="cpu")

    assert [r.status for r in history] == ["ok", "ok", "failed", "ok", "ok"]
    assert "NaN" in history[2].error


def test_a_run_that_is_over_says_so_and_is_not_called_stopped(run):
    history = audited(run, budget=LeakageBudget(limit=0.51, rule="point"))

    assert history.stopped is None
    assert history[-1].decision.is_within_budget is False


def test_a_checkpoint_that_is_the_base_is_named(run, tmp_path, caplog):
    shutil.copytree(run.base, tmp_path / "checkpoint-7")

    audit_checkpoints(find_checkpoints(tmp_path), run.canaries, base=run.base, device="cpu")

    assert "predicts exactly what the base predicts" in caplog.text


def test_the_history_says_that_it_was_made_afterwards(run, tmp_path):
    history = audited(run, output_dir=tmp_path)

    assert history.run_metadata.base_model == str(run.base)
    assert history.run_metadata.n_checkpoints is not None
    assert AuditHistory.load(tmp_path / "history.jsonl").run_metadata == history.run_metadata


def test_provenance_comes_from_the_canaries_alone(run, curve):
    texts = make_texts(100, seed=5)
    lists = CanarySet.from_lists(texts[:40], texts[40:])

    listed = audit_checkpoints(
        find_checkpoints(run.folder / "checkpoint-15"), lists, base=run.base, device="cpu"
    )

    assert "drawn at random" in curve.about
    assert "not randomized" in listed.about


def test_texts_are_tokenized_with_the_tokenizer_of_the_run(run):
    tokenizer = make_tokenizer()
    texts = CanarySet(
        records=tuple(tokenizer.decode(r["input_ids"]) for r in run.canaries.records),
        is_member=run.canaries.is_member,
        record_ids=run.canaries.record_ids,
        provenance=run.canaries.provenance,
    )

    history = audit_checkpoints(
        find_checkpoints(run.folder), texts, base=run.base, batch_size=BATCH_SIZE, device="cpu"
    )

    assert figures(history) == figures(run.history)


def test_canaries_that_truncation_makes_equal_are_left_out(run, caplog):
    same = [f"the old river {text}" for text in make_texts(2, seed=8)]
    texts = make_texts(60, seed=7)
    canaries = CanarySet.from_lists([*texts[:30], same[0]], [*texts[30:], same[1]])

    history = audit_checkpoints(
        find_checkpoints(run.folder / "checkpoint-15"), canaries, base=run.base, device="cpu", max_length=3
    )

    assert history[0].n_members <= 30
    assert history[0].n_non_members <= 30
    assert "truncation makes them the same" in caplog.text


def test_precision_can_be_chosen(run, curve):
    whole, half = curve, audited(run, dtype="bfloat16")

    assert whole[-1].member_loss != half[-1].member_loss
    assert whole[-1].member_loss == pytest.approx(half[-1].member_loss, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "no-such-folder/model"}, "cannot be loaded as the base model"),
        ({"device": "abacus"}, "There is no device 'abacus' here"),
        ({"score": "magic"}, "Unknown score 'magic'"),
    ],
)
def test_bad_arguments_say_what_is_wrong(run, options, message):
    with pytest.raises(ConfigurationError, match=message):
        audited(run, **options)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no model"):
        find_checkpoints(tmp_path)
    with pytest.raises(ConfigurationError, match="There is no folder"):
        find_checkpoints(tmp_path / "nowhere")


def test_an_interrupted_audit_of_a_finished_run_says_so_and_stops_nothing(run, tmp_path, monkeypatch, caplog):
    """The run was over before: a history that is cut off must not say that an audit ended it."""
    caplog.set_level(logging.INFO)
    real, loaded = Loader.load, []

    def load(self, checkpoint):
        loaded.append(checkpoint)
        if len(loaded) == N_EPOCHS:
            raise KeyboardInterrupt
        return real(self, checkpoint)

    monkeypatch.setattr(Loader, "load", load)

    with pytest.raises(KeyboardInterrupt):
        audited(run, budget=LeakageBudget(limit=0.51, rule="point"), output_dir=tmp_path)

    history = AuditHistory.load(tmp_path / "history.jsonl")
    assert [result.decision.is_within_budget for result in history] == [True, False, False, False]
    assert history.stopped is None
    assert history.is_complete is False
    assert "STOP" not in caplog.text
    outcome = to_document(history)["runs"][0]["outcome"]
    assert outcome["kind"] == "over budget"
    assert "Kept" not in outcome["text"]


def test_an_audit_that_went_through_leaves_a_whole_history(run, tmp_path):
    history = audited(run, budget=LeakageBudget(limit=0.51, rule="point"), output_dir=tmp_path)

    assert AuditHistory.load(tmp_path / "history.jsonl").is_complete
    assert AuditHistory.load(tmp_path / "history.jsonl").to_dicts() == history.to_dicts()
