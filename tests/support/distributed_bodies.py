"""What each process does in the tests of `test_distributed.py`."""

import datetime
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import make_model, make_rows, make_texts
from torch.distributed.distributed_c10d import _set_pg_timeout
from writing_models import times

from ezmia_callbacks import LeakageBudget, PrivacyAuditor, distributed, hold_out_canaries
from ezmia_callbacks.audit import kept_weights, rejected
from ezmia_callbacks.audit.kept_weights import KeptWeights
from ezmia_callbacks.audit.run_folder import RunFolder
from ezmia_callbacks.distributed import gather
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.scoring import forward

# Seconds that processes wait for each other there; as much as a busy machine needs besides.
_GROUP_WAITS = 10

N_MEMBERS, N_NON_MEMBERS, BATCH_SIZE = 31, 60, 8


def make_canaries(seed: int = 0):
    # Of many lengths, so that the order of the batches matters.
    texts = [" ".join(text.split()[: 3 + i % 9]) for i, text in enumerate(make_texts(300))]
    rows = make_rows(list(dict.fromkeys(texts)))
    return hold_out_canaries(rows, n_members=N_MEMBERS, n_non_members=N_NON_MEMBERS, seed=seed)[1]


def trained(model, amount: float = 0.05):
    """The model after something that stands for training, the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            full = amount * torch.randn(parameter.shape, generator=generator)
            parameter.add_(_as(parameter, full))
    return model


def _as(parameter, full):
    if not hasattr(parameter, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, parameter.device_mesh, parameter.placements)


def audit_twice(folder: Path | None, model, *, batch_size: int = BATCH_SIZE) -> dict[str, Any]:
    """Baseline and audit; the figures, the reference and the number of forward passes."""
    n_forwards = 0

    def count(*_: object) -> None:
        nonlocal n_forwards
        n_forwards += 1

    model.register_forward_hook(count)
    auditor = PrivacyAuditor(
        make_canaries(), n_audits=1, batch_size=batch_size, output_dir=folder, assume_seen=True
    )
    auditor.begin(model)
    result = auditor.audit(trained(model))
    return {
        "result": {k: v for k, v in result.to_dict().items() if k not in ("seconds", "overhead")},
        "scores": result.scores,
        "reference": auditor.reference.log_probs,
        "n_forwards": n_forwards,
    }


def audit(rank: int, folder: Path) -> dict[str, Any]:
    outcome = audit_twice(folder / "audit", make_model())
    return outcome | {"n_lines": len((folder / "audit" / "history.jsonl").read_text().splitlines())}


def audit_wrapped(rank: int, folder: Path) -> dict[str, Any]:
    """With a data-parallel wrapper, whose forward pass sends the main process's buffers to all."""
    model = make_model()
    model.register_buffer("own", torch.tensor([float(rank)]))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    # The wrapper sends them once when it is built.
    model.own.fill_(rank)
    return audit_twice(None, wrapped) | {"buffer": model.own.item()}


class Around(torch.nn.Module):
    """A wrapper of the user's own, as Lightning Fabric has one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


def audit_wrapped_in_another_module(rank: int, folder: Path) -> dict[str, Any]:
    """The same inside another module, with batches that the processes cannot share evenly."""
    model = make_model()
    model.register_buffer("own", torch.tensor([float(rank)]))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    model.own.fill_(rank)
    outcome = audit_twice(None, Around(wrapped), batch_size=13)
    return outcome | {"buffer": model.own.item(), "sends": wrapped.require_forward_param_sync}


def audit_sharded(rank: int, folder: Path) -> dict[str, Any]:
    """Under FSDP2, where every forward pass is a collective operation."""

    model = _sharded()
    outcome = audit_twice(None, model)
    is_sharded_again = all(hasattr(parameter, "to_local") for parameter in model.parameters())
    snapshot = KeptWeights(folder / "kept")
    before = [p.to_local().clone() for p in model.parameters()]
    snapshot.save(model, step=3)
    trained(model)
    is_changed = not all(
        torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True)
    )
    step = snapshot.restore(model).step
    is_back = all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
    return outcome | {
        "is_sharded_again": is_sharded_again,
        "is_changed": is_changed,
        "is_back": is_back,
        "step": step,
        "files": sorted(path.name for path in (folder / "kept").iterdir()),
    }


def _sharded(**options: Any):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make_model()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def count_passes_and_bytes(rank: int, folder: Path) -> dict[str, Any]:
    """Passes of one audit, bytes of its statistics and of weights that this process keeps; data parallel."""
    model = make_model()
    auditor = _auditor_that_keeps(folder)
    auditor.begin(model)
    lengths = []
    model.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(1), with_kwargs=True)
    auditor.audit(trained(model, 1e-3))
    n_forwards = len(lengths)
    target = auditor.target
    arrays = (target.log_probs, target.is_correct, target.means, target.standard_deviations, target.offsets)
    return {
        "n_forwards": n_forwards,
        "n_records": target.n_records,
        "n_tokens": target.n_tokens,
        "bytes_of_statistics": sum(array.nbytes for array in arrays),
        "bytes_of_kept_weights": _bytes_kept(rank, folder, auditor),
    }


def count_bytes_under_a_mixed_policy(rank: int, folder: Path) -> dict[str, Any]:
    """FSDP2 that computes in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    auditor = _auditor_that_keeps(folder)
    # Parts that are alike, such as norms of ones at the start, are kept once.
    auditor.begin(trained(_sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))))
    return {"bytes_of_kept_weights": _bytes_kept(rank, folder, auditor)}


def _auditor_that_keeps(folder: Path) -> PrivacyAuditor:
    return PrivacyAuditor(
        make_canaries(),
        budget=LeakageBudget(limit=0.9, rule="point"),
        n_audits=2,
        output_dir=folder / "audit",
        assume_seen=True,
    )


def _bytes_kept(rank: int, folder: Path, auditor: PrivacyAuditor) -> int:
    auditor._weights.wait()
    gather(None)
    kept = folder / "audit" / "last_within_budget"
    files = [load_file(path) for path in kept.glob(f"{rank}-*.safetensors")]
    return sum(tensor.nbytes for file in files for tensor in file.values())


def run_out_of_memory(rank: int, folder: Path) -> dict[str, Any]:
    """One process has room for half as many records as the others."""
    model = make_model()
    inner = model.forward

    def forward(input_ids, **kwargs):
        if rank == 1 and len(input_ids) > BATCH_SIZE // 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return inner(input_ids=input_ids, **kwargs)

    model.forward = forward
    return audit_twice(None, model)


def have_less_memory_for_a_batch_of_a_sharded_model(rank: int, folder: Path) -> dict[str, Any]:
    """One process cannot allocate what it is asked for first, and nothing as large."""
    model, sizes, asked = _sharded(), [], []

    def allocate(n_bytes: int, device: torch.device) -> None:
        asked.append(n_bytes)
        if rank == 1 and n_bytes >= asked[0]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    with patch.object(forward, "take_and_give_back", allocate):
        return audit_twice(None, model) | {"largest_batch": max(sizes)}


def have_no_memory_at_one_audit_of_a_sharded_model(rank: int, folder: Path) -> dict[str, Any]:
    """One process cannot allocate what a single record needs; at the next audit it can."""
    model = _sharded()
    auditor = PrivacyAuditor(make_canaries(), n_audits=2, on_error="warn", batch_size=BATCH_SIZE)
    auditor.begin(model)

    def refuse(n_bytes: int, device: torch.device) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    take = refuse if rank == 1 else forward.take_and_give_back
    with patch.object(forward, "take_and_give_back", take):
        auditor.audit(model)
    auditor.audit(model)
    return {
        "statuses": [result.status for result in auditor.history],
        "error": auditor.history[1].error,
    }


def fail_with_a_warning(rank: int, folder: Path) -> dict[str, Any]:
    return _fail(rank, folder, "warn")


def be_changed(rank: int, folder: Path) -> dict[str, Any]:
    """An audit overwrites a weight of one process's model."""
    model = make_model()
    auditor = PrivacyAuditor(make_canaries(), n_audits=1, on_error="warn")
    auditor.begin(model)
    if rank == 1:
        model.transformer.wte.register_forward_pre_hook(times(0.5))
    try:
        auditor.audit(model)
    except AuditError as error:
        return {"raised": f"{type(error).__name__}: {error}", "status": auditor.history[-1].status}
    return {"raised": None}


def fail_with_an_error(rank: int, folder: Path) -> dict[str, Any]:
    return _fail(rank, folder, "raise")


def _fail(rank: int, folder: Path, on_error: str) -> dict[str, Any]:
    model = make_model()
    auditor = PrivacyAuditor(make_canaries(), n_audits=1, output_dir=folder / "audit", on_error=on_error)
    auditor.begin(model)
    if rank == 1:
        with torch.no_grad():
            model.transformer.ln_f.weight.fill_(float("nan"))
    try:
        result = auditor.audit(model)
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return {"status": result.status, "error": result.error}


def fail_between_passes_of_a_sharded_model(rank: int, folder: Path) -> dict[str, Any]:
    """One process finds NaN where the others do not: in what its own pass returned."""
    model, calls = _sharded(), iter(range(1_000))

    def logits_fn(model, input_ids, attention_mask):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        is_ill = rank == 1 and calls_of_audit and next(calls) == 2
        return logits * float("nan") if is_ill else logits

    calls_of_audit: list[bool] = []
    auditor = PrivacyAuditor(make_canaries(), n_audits=2, logits_fn=logits_fn, batch_size=BATCH_SIZE)
    auditor.begin(model)
    calls_of_audit.append(True)
    return {"statuses": [auditor.audit(model).status for _ in range(2)], "error": auditor.history[1].error}


def fail_in_a_pass_of_a_sharded_model(rank: int, folder: Path) -> dict[str, Any]:
    """One process fails between the exchanges of weights of two layers, although errors shall only warn."""
    _set_pg_timeout(datetime.timedelta(seconds=_GROUP_WAITS), dist.group.WORLD)
    model = _sharded()
    auditor = PrivacyAuditor(make_canaries(), n_audits=2, on_error="warn", batch_size=BATCH_SIZE)
    auditor.begin(model)

    def fail(module, args):
        raise ValueError("a kernel failed")

    if rank == 1:
        model.transformer.h[1].mlp.register_forward_pre_hook(fail)
    started = time.monotonic()
    try:
        auditor.audit(model)
    except AuditError as error:
        told = f"{type(error).__name__}: {error}"
    else:
        told = "nothing"
    return {
        "told": told,
        "seconds": time.monotonic() - started,
        "status": auditor.history[-1].status,
        "is_sharded": all(hasattr(parameter, "to_local") for parameter in model.parameters()),
    }


def differ_in_canaries(rank: int, folder: Path) -> str:
    auditor = PrivacyAuditor(make_canaries(seed=rank), n_audits=1)
    try:
        auditor.begin(make_model())
    except ConfigurationError as error:
        return str(error)
    return "not refused"


def keep_in_memory(rank: int, folder: Path) -> dict[str, Any]:
    return _keep_and_put_back(rank, folder, None)


def keep_on_disk(rank: int, folder: Path) -> dict[str, Any]:
    return _keep_and_put_back(rank, folder, folder / "audit")


def keep_without_room_for_a_copy(rank: int, folder: Path) -> dict[str, Any]:
    """Replicated weights, which the main process writes alone; it waits, and for nobody else."""
    has_memory_for = kept_weights.has_memory_for
    kept_weights.has_memory_for = lambda n_bytes: False
    try:
        return _keep_and_put_back(rank, folder, folder / "audit")
    finally:
        kept_weights.has_memory_for = has_memory_for


def keep_on_a_slow_disk(rank: int, folder: Path) -> dict[str, Any]:
    """The first write of each kind takes longer than the processes wait for each other in a collective."""
    _set_pg_timeout(datetime.timedelta(seconds=_GROUP_WAITS), dist.group.WORLD)
    distributed._TURN = 1.0
    writes = ((kept_weights, "write_tensors"), (RunFolder, "save_audits"), (rejected, "write_atomically"))
    with ExitStack() as stack:
        for owner, name in writes:
            stack.enter_context(patch.object(owner, name, _slow_once(getattr(owner, name))))
        return _keep_and_put_back(rank, folder, folder / "audit", keep_rejected=True)


def _slow_once(write):
    is_slow = iter([True])

    def slow(*args, **kwargs):
        if next(is_slow, False):
            time.sleep(_GROUP_WAITS + 4)
        return write(*args, **kwargs)

    return slow


def _keep_and_put_back(
    rank: int, folder: Path, output_dir: Path | None, *, keep_rejected: bool = False
) -> dict[str, Any]:
    """Replicated weights: an audit inside the budget, one over it, and back."""
    model = make_model()
    auditor = PrivacyAuditor(
        make_canaries(),
        budget=LeakageBudget(limit=0.9, rule="point"),
        n_audits=2,
        output_dir=output_dir,
        keep_rejected=keep_rejected,
        assume_seen=True,
    )
    auditor.begin(model)
    auditor.audit(trained(model, 1e-3))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained(model, 0.1 * (1 + rank))
    restored = auditor.restore_within_budget(model)
    state = model.state_dict()
    return {
        "step": restored.step,
        "is_back": all(torch.equal(state[name], kept[name]) for name in kept),
        "files": sorted(path.name for path in folder.glob("audit/last_within_budget/*")),
    }


def fail_to_keep(rank: int, folder: Path) -> dict[str, Any]:
    """The disk is full on one process of a sharded model: all keep the older weights."""
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(rank)  # each process has its own part
    snapshot = KeptWeights(folder / "kept")
    snapshot.save(model, step=1)
    with torch.no_grad():
        model.weight.add_(10)
    write = kept_weights.write_tensors
    if rank == 1:
        kept_weights.write_tensors = _full_disk
    try:
        snapshot.save(model, step=2)
        snapshot.settle()
    except (OSError, AuditError) as error:
        raised = type(error).__name__
    else:
        raised = "nothing"
    finally:
        gather(None)
    kept_weights.write_tensors = write
    return {"raised": raised, "step": snapshot.restore(model).step, "weight": model.weight[0, 0].item()}


def _full_disk(path: Path, tensors: object) -> None:
    raise OSError(28, "No space left on device")
