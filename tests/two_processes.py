"""What each of two real processes does; a module of its own, so that a spawned process can import it."""

import datetime
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks import PrivacyAuditor, hold_out_canaries


def audit_in_process(rank: int, folder: Path, failing_rank: int | None) -> None:
    """Audit a model whose weights differ a little, or a lot, from process to process; leave the result."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=40),
    )
    _, canaries = hold_out_canaries(make_rows(make_texts(120)), n_members=30, n_non_members=60, seed=0)
    model = make_model()
    auditor = PrivacyAuditor(canaries, n_audits=2, output_dir=folder / "audit")
    auditor.begin(model)
    with torch.no_grad():
        model.transformer.wte.weight.add_(0.01 * torch.randn(model.transformer.wte.weight.shape))
        if rank == failing_rank:
            model.transformer.ln_f.weight.fill_(float("nan"))
    result = auditor.audit(model)
    (folder / f"outcome-{rank}.json").write_text(json.dumps(result.to_dict()))
    dist.destroy_process_group()
