"""What a fault leaves behind: readable files, a run that resumes, and an untouched training batch."""

import ast
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_tiny import draw, make_trainer
from tiny import make_model
from transformers import TrainerCallback

from ezmia_callbacks import AuditHistory, LeakageBudget, PrivacyAuditCallback, PrivacyAuditor
from ezmia_callbacks.audit import kept_weights, weight_files
from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.errors import AuditError, AuditMemoryError
from ezmia_callbacks.results import history as history_module
from ezmia_callbacks.scoring.forward import token_statistics
from ezmia_callbacks.scoring.memory import fit_into_memory
from ezmia_callbacks.scoring.rows import encode_canaries

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
)

BUDGET = LeakageBudget(limit=0.9, rule="point")

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


def limit_memory(model, *, n_records, error=OUT_OF_MEMORY[0], is_full_from_the_start=True):
    """Make the model's evaluation passes fail for batches that are too large; training is not touched."""
    calls, is_full = [], [is_full_from_the_start]

    def refuse(module, arguments, options):
        if module.training:
            is_full[0] = True
            return
        calls.append(len(options["input_ids"]))
        if is_full[0] and len(options["input_ids"]) > n_records:
            raise error

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return calls


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_audit_batch_and_goes_on(caplog, error):
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, batch_size=16, n_audits=2)
    calls = limit_memory(model, n_records=4, error=error)

    baseline = auditor.begin(model)
    result = auditor.audit(model)

    assert result.status == "ok"
    assert [baseline.batch_size, result.batch_size] == [4, 4]
    assert max(calls[-23:]) == 4
    assert [record.message for record in caplog.records if "out of memory" in record.message] == [
        "The audit ran out of memory with 16 records in a batch; from here on it takes 8.",
        "The audit ran out of memory with 8 records in a batch; from here on it takes 4.",
    ]


def test_a_batch_that_is_halved_in_mid_run_is_in_the_history_file(tmp_path):
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, batch_size=16, n_audits=2, output_dir=tmp_path)
    auditor.begin(model)
    limit_memory(model, n_records=8)

    auditor.audit(model)
    auditor.audit(model)

    assert [result.batch_size for result in AuditHistory.load(tmp_path / "history.jsonl")] == [16, 8, 8]


@pytest.mark.parametrize("batch_size", [8, 1])
def test_another_batch_size_moves_log_probabilities_by_rounding_only(batch_size):
    """The reference was computed with the larger batch; the difference must not look like training."""
    _, canaries = draw()
    rows = encode_canaries(canaries, None).rows
    model = make_model()

    whole = token_statistics(model, rows, batch_size=16)
    halved = token_statistics(model, rows, batch_size=batch_size)

    np.testing.assert_allclose(halved.log_probs, whole.log_probs, rtol=0, atol=5e-6)
    np.testing.assert_array_equal(halved.is_correct, whole.is_correct)


def test_a_record_that_does_not_fit_alone_is_an_error_of_the_package():
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries)
    limit_memory(model, n_records=0)

    with pytest.raises(AuditMemoryError, match="One canary at a time is too much") as caught:
        auditor.begin(model)

    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_an_error_of_a_full_memory_does_not_look_like_one_to_the_trainer():
    from accelerate.utils.memory import should_reduce_batch_size

    def fail(_batch_size):
        raise OUT_OF_MEMORY[0]

    with pytest.raises(AuditMemoryError) as caught:
        fit_into_memory(fail, batch_size=4)

    assert should_reduce_batch_size(OUT_OF_MEMORY[0])
    assert not should_reduce_batch_size(caught.value)
    # Should someone wrap it into an error of another type:
    assert not should_reduce_batch_size(RuntimeError(str(caught.value)))


def test_other_errors_are_not_taken_for_a_full_memory():
    sizes = []

    def fail(batch_size):
        sizes.append(batch_size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit_into_memory(fail, batch_size=8)
    assert sizes == [8]


@pytest.mark.parametrize(("n_records", "status"), [(4, "ok"), (0, "failed")])
def test_an_audit_out_of_memory_does_not_shrink_the_training_batch(tmp_path, n_records, status):
    rows, canaries = draw()
    model = make_model()
    audit = PrivacyAuditCallback(canaries)
    limit_memory(model, n_records=n_records, is_full_from_the_start=False)
    trainer = make_trainer(
        tmp_path, rows, [audit], model=model, auto_find_batch_size=True, num_train_epochs=1
    )

    trainer.train()

    assert audit.history[-1].status == status
    assert trainer._train_batch_size == 8
    assert trainer.state.global_step == 8
    assert len(audit.history.audits_after_baseline) == 1


def test_out_of_memory_before_the_first_step_does_not_shrink_the_training_batch(tmp_path):
    rows, canaries = draw()
    model = make_model()
    limit_memory(model, n_records=0)
    trainer = make_trainer(
        tmp_path, rows, [PrivacyAuditCallback(canaries)], model=model, auto_find_batch_size=True
    )

    with pytest.raises(AuditMemoryError, match="One canary at a time"):
        trainer.train()

    assert trainer._train_batch_size == 8
    assert trainer.state.global_step == 0


def smaller_batch_size(batch_size):
    """What accelerate tries after a batch that was too large: half, or a tenth less, by its release."""
    from accelerate.utils import find_executable_batch_size

    tried = []

    def fail_once(batch_size):
        tried.append(batch_size)
        if len(tried) == 1:
            raise OUT_OF_MEMORY[0]

    find_executable_batch_size(fail_once, starting_batch_size=batch_size)()
    return tried[1]


def test_training_out_of_memory_still_finds_its_batch_size_and_keeps_the_reference(tmp_path, caplog):
    rows, canaries = draw()
    model = make_model()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    seen = []

    def refuse(module, arguments, options):
        if module.training:
            seen.append(len(options["input_ids"]))
            if len(seen) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    trainer = make_trainer(
        tmp_path, rows, [audit], model=model, auto_find_batch_size=True, num_train_epochs=1
    )

    trainer.train()

    assert seen[:5] == [8, 8, 8, 8, smaller_batch_size(8)]
    assert "the reference taken before the first step is kept" in caplog.text
    assert [result.step for result in audit.history] == [0, trainer.state.max_steps]


def break_forward(model):
    """Every evaluation pass fails once training has begun."""
    trained = []

    def refuse(module, arguments):
        if module.training:
            trained.append(1)
        elif trained:
            raise ValueError("a kernel broke")

    model.register_forward_pre_hook(refuse)


def test_an_exception_in_an_audit_is_a_gap_when_errors_warn(tmp_path):
    rows, canaries = draw()
    model = make_model()
    break_forward(model)
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(tmp_path, rows, [audit], model=model, num_train_epochs=2)

    trainer.train()

    assert [result.status for result in audit.history] == ["ok", "failed", "failed"]
    assert re.fullmatch(r"ValueError in \S+, line \d+", audit.history[-1].error)
    assert trainer.state.global_step == 16


def test_an_exception_in_an_audit_ends_training_when_errors_raise(tmp_path):
    rows, canaries = draw()
    model = make_model()
    break_forward(model)
    audit = PrivacyAuditCallback(canaries, on_error="raise")
    trainer = make_trainer(tmp_path, rows, [audit], model=model)

    with pytest.raises(ValueError, match="a kernel broke"):
        trainer.train()

    assert trainer.state.global_step == 8
    assert AuditHistory.load(tmp_path / "_privacy_audit" / "history.jsonl").n_failed == 1
    assert not any(module.training is False for module in model.modules() if module is model)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    rows, canaries = draw()
    (tmp_path / "file").write_text("in the way")
    audit = PrivacyAuditCallback(canaries, output_dir=tmp_path / "file" / "audit")
    trainer = make_trainer(tmp_path / "run", rows, [audit])

    with pytest.raises(OSError, match=r"The audit cannot write to .*: pass an `output_dir`"):
        trainer.train()

    assert trainer.state.global_step == 0


def kept_in(folder):
    kept = KeptWeights(folder / "last_within_budget")
    kept.run_id = AuditHistory.load(folder / "history.jsonl").run_metadata.run_id
    return kept


def test_a_disk_that_fills_up_leaves_the_older_files_and_training_goes_on(tmp_path, caplog):
    rows, canaries = draw()
    folder = tmp_path / "_privacy_audit"
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    seen = {}

    class FillDisk(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.global_step == 8:
                audit.auditor.state_dict()  # waits until the weights of step 8 are written
                patch.setattr(os, "fsync", full)

        def on_epoch_end(self, args, state, control, **kwargs):
            if state.global_step == 16:
                seen["history"] = len(AuditHistory.load(folder / "history.jsonl"))
                seen["step"] = kept_in(folder).step
                seen["files"] = sorted(path.name for path in folder.iterdir())

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(tmp_path, rows, [audit, FillDisk()], num_train_epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        trainer.train()

    assert trainer.state.global_step == 24
    assert [result.status for result in audit.history] == ["ok"] * 4
    assert seen["history"] == 2
    assert seen["step"] == 8
    assert seen["files"] == [
        ".lock",
        ".writer.json",
        "history.jsonl",
        "last_audit.safetensors",
        "last_within_budget",
        "reference.safetensors",
        "trajectories.safetensors",
    ]
    assert "The audit history could not be written" in caplog.text
    assert "(OSError: No space left on device" in caplog.text


def train_until_killed(folder, n_writes, moment):
    """Train in this process until it kills itself just before or after the rename of one write.

    Or in the middle of writing weights, in the background, or of appending an audit to the history.
    """
    rename, seen = Path.replace, []
    write, n_written = weight_files._write, []

    def write_half(to, content):
        n_written.append(1)
        if moment == "half of the weights" and len(n_written) == n_writes:
            to(bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(to, content)

    weight_files._write = write_half
    append, n_appended = history_module.append, []

    def append_half(path, content):
        n_appended.append(1)
        if moment == "half of an audit" and len(n_appended) == n_writes:
            append(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, content)

    history_module.append = append_half

    def replace(self, target):
        seen.append(1)
        if len(seen) == n_writes and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = rename(self, target)
        if len(seen) == n_writes and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    Path.replace = replace
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    if moment == "half of the weights":  # no checkpoint that could stand for them
        kept_weights._link = lambda files, names: False
    make_trainer(folder, rows, [audit], num_train_epochs=4, save_strategy="epoch").train()


# Files that are replaced: who writes, reference, history, trajectories, the last audit and weights at the
# start; then the last three each epoch, and the checkpoint's note. The history is appended to.
@pytest.mark.parametrize(
    ("n_writes", "moment"),
    [
        *((n_writes, moment) for n_writes in (11, 12, 13, 14) for moment in ("before", "after")),
        (15, "before"),
        (16, "after"),
        # Of the second file of weights and the third: each has a head and 28 tensors.
        *((n_writes, "half of the weights") for n_writes in (32, 60)),
        *((n_writes, "half of an audit") for n_writes in (2, 3)),
    ],
)
@pytest.mark.usefixtures("checkpoints_of_old_releases")
# Forking a process that has other threads; the child ends by its own signal.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed, which needs fork")
def test_a_run_killed_in_a_write_leaves_readable_files_and_resumes(tmp_path, n_writes, moment):
    rows, canaries = draw()
    straight = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    plain = make_trainer(tmp_path / "straight", rows, [straight], num_train_epochs=4, save_strategy="epoch")
    plain.train()

    process = multiprocessing.get_context("fork").Process(
        target=train_until_killed, args=(tmp_path / "killed", n_writes, moment)
    )
    process.start()
    process.join(timeout=60)
    folder = tmp_path / "killed" / "_privacy_audit"
    left = AuditHistory.load(folder / "history.jsonl")
    # What is kept is whole, and says so: this compares every tensor.
    kept_in(folder).restore(make_model())
    resumed = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")
    trainer = make_trainer(tmp_path / "killed", rows, [resumed], num_train_epochs=4, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=True)

    assert process.exitcode == -signal.SIGKILL
    assert 1 < len(left) < 5
    assert [r.metrics["auc"].value for r in resumed.history] == [
        r.metrics["auc"].value for r in straight.history
    ]
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    # Nothing of the killed write stays, either.
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "history.jsonl",
        "last_audit.safetensors",
        "reference.safetensors",
        "trajectories.safetensors",
    ]
    assert list(folder.glob("checkpoints/.*")) == []


@pytest.fixture
def interrupts():
    """SIGINT as in a terminal; a shell starts background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 11:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_in_training_leaves_a_valid_history(tmp_path):
    rows, canaries = draw()
    audit = PrivacyAuditCallback(canaries, budget=BUDGET, every="epoch")

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, rows, [audit, Interrupt()]).train()

    lines = (tmp_path / "_privacy_audit" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[1:]] == [0, 8]


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_in_an_audit_leaves_the_model_in_training_mode_and_a_valid_history(tmp_path):
    rows, canaries = draw()
    model = make_model()
    calls = []

    def interrupt(module, arguments):
        if not module.training:
            calls.append(1)
            if len(calls) == 14:
                os.kill(os.getpid(), signal.SIGINT)

    model.register_forward_pre_hook(interrupt)
    audit = PrivacyAuditCallback(canaries)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, rows, [audit], model=model).train()

    assert all(module.training for module in model.modules())
    assert [r.step for r in AuditHistory.load(tmp_path / "_privacy_audit" / "history.jsonl")] == [0]


def test_damaged_weights_are_an_error_that_says_so(tmp_path):
    _, canaries = draw()
    model = make_model()
    auditor = PrivacyAuditor(canaries, budget=BUDGET, output_dir=tmp_path)
    auditor.begin(model)
    (tmp_path / "last_within_budget" / "index-0.json").write_bytes(b"half a fi")
    resumed = PrivacyAuditor(canaries, budget=BUDGET, output_dir=tmp_path)

    with pytest.raises(AuditError, match="are damaged"):
        resumed.resume(model, auditor.history.to_dicts(), step=0)


def test_every_test_named_in_the_documentation_exists():
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "reliability.md").read_text(encoding="utf-8")))
    defined = {
        node.name
        for path in (root / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }

    assert len(named) > 40
    assert named - defined == set()
