"""What damaged or hostile files lead to: taken as what they say, refused by an error of the package, or else.

    python benchmarks/fuzz_files.py            # 1,000 mutations of each kind of file; a few minutes
    python benchmarks/fuzz_files.py --n 200

Each file is written by the package, one thing of it is changed, and it is read again. "As it says": what
was read, written down again, says what the changed file says, and what people read of it can be written.
"Refused": an error of `ezmia_callbacks.errors`. Anything else is a fault: it is listed, and the exit code
is 1. The changes are drawn from a seed; the same seed makes the same ones.
"""

import argparse
import json
import logging
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ezmia_callbacks import AuditHistory, CanarySet, LeakageBudget, PrivacyAuditor, hold_out_canaries
from ezmia_callbacks.array_files import save_arrays
from ezmia_callbacks.canaries import load_canaries, save_canaries
from ezmia_callbacks.canaries.record_files import read_record_file
from ezmia_callbacks.canaries.records import canonical_record
from ezmia_callbacks.canaries.sets import CanaryDetails, Provenance
from ezmia_callbacks.errors import AuditError
from ezmia_callbacks.huggingface.checkpoint_notes import CheckpointNotes, kept_in_state
from ezmia_callbacks.report import render_report, summarize, to_document
from ezmia_callbacks.report.view import from_plain, to_plain
from ezmia_callbacks.results import Trajectories, most_exposed
from ezmia_callbacks.results.consistency import CONTRADICTION
from ezmia_callbacks.results.result import NEWER_FIELDS
from ezmia_callbacks.safe_text import for_document
from ezmia_callbacks.scoring.rows import encode_canaries
from ezmia_callbacks.scoring.statistics import load_statistics

# What JSON's own writer would not write: put into the text afterwards.
# Fields that older files lack: without them they say the same.
NEWER = NEWER_FIELDS | {"details", "groups", "is_complete", "exposures", "judged_by", "run_id", "run"}
DEEP, DIGITS = "@deep@", "@digits@"
N_TOKENS, LENGTH = 32, 12

STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.0,
    0.5,
    1.5,
    1e308,
    -1e-320,
    math.nan,
    math.inf,
    -math.inf,
    2**53 + 1,
    2**63,
    2**64,
    10**400,
    "",
    "0.5",
    "ok",
    "\ud800",
    "\x00\ufffe\uffff",
    "\x1b]8;;http://example.org\x07here\x1b]8;;\x07\x9b31m\r\u202e",
    "<img src=x onerror=alert(1)>|\n# heading [a](b)",
    "²",
    "NaN",
    [],
    {},
    [None],
    {"": None},
    [[0, 1], [2]],
    {"step": 0},
    DEEP,
    DIGITS,
)


class Outcome(NamedTuple):
    """What became of one mutation."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: What it is.
        mutated: Draws a change; gives what `read` takes and, for people, what it was.
        read: Reads it; gives what was read, and what it was read of, as plain values.
        original: What `read` takes, as the package wrote it; None where `mutated` alone knows.
    """

    name: str
    mutated: Callable[[np.random.Generator], tuple[Any, str]]
    read: Callable[[Any], tuple[Any, Any]]
    original: Any = None


def outcome_of(kind: Kind, content: Any) -> Outcome:
    """What becomes of a mutated content."""
    try:
        found, said = kind.read(content)
        is_as_said = is_same(found, said)
    except AuditError as error:
        return Outcome("refused", str(error))
    except Exception as error:
        return Outcome("fault", f"{type(error).__name__}: {error!r:.300}")
    if not is_as_said:
        return Outcome("fault", "accepted as something else")
    return Outcome("as it says")


def is_same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal: in type, too, but for whole numbers where any will do."""
    if isinstance(one, dict) and isinstance(other, dict):
        added = one.keys() - other.keys()
        return added <= NEWER and other.keys() <= one.keys() and all(is_same(one[k], other[k]) for k in other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isinstance(one, bool) == isinstance(other, bool) and one == other
    return type(one) is type(other) and bool(one == other)


def with_characters(value: Any) -> Any:
    """The value with U+FFFD in its texts for what is no character."""
    if isinstance(value, str):
        return for_document(value)
    if isinstance(value, dict):
        return {for_document(key): with_characters(item) for key, item in value.items()}
    return [with_characters(item) for item in value] if isinstance(value, list) else value


def places_in(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a value: keys and numbers, from the outside in."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in inner for found in places_in(item, (*place, key)))]


def mutate(value: Any, rng: np.random.Generator) -> tuple[Any, str]:
    """A copy in which one thing is another, and what was done."""
    whole = [deepcopy(value)]
    places = places_in(whole[0])
    # By depth first: most places are numbers deep inside.
    depth = rng.choice([len(place) for place in dict.fromkeys(len(p) * (0,) for p in places)])
    place = (0, *_pick([p for p in places if len(p) == depth], rng))
    owner: Any = whole
    for key in place[:-1]:
        owner = owner[key]
    key = place[-1]
    item = owner[key]
    changes: list[str] = ["replace"] * 4
    if isinstance(owner, dict):
        changes += ["delete", "rename", "beside"]
    if isinstance(owner, list) and len(place) > 1:
        changes += ["delete", "twice"]
    if isinstance(item, list) and len(item) > 1:
        changes += ["reverse", "swap", "reverse"]
    if isinstance(item, int | float | bool) or item is None:
        changes += ["as text"]
    if isinstance(item, str) and item:
        changes += ["append"]
    change = _pick(changes, rng)
    described = f"{change} {'.'.join(map(str, place[1:]))}"
    if change == "replace":
        new = deepcopy(_pick(STRANGE, rng))
        owner[key], described = new, f"{described} by {new!r:.60}"
    elif change == "delete":
        del owner[key]
    elif change == "rename":
        owner[f"{key}_"] = owner.pop(key)
    elif change == "beside":
        owner["unheard_of"] = deepcopy(_pick(STRANGE, rng))
    elif change == "twice":
        owner.insert(key, deepcopy(item))
    elif change == "reverse":
        item.reverse()
    elif change == "swap":
        item[0], item[-1] = item[-1], item[0]
    elif change == "as text":
        owner[key] = json.dumps(item)
    else:
        owner[key] = item + _pick([s for s in STRANGE if isinstance(s, str)], rng)
    return whole[0], described


def as_text(value: Any) -> str:
    """JSON, with what its writer does not write."""
    text = json.dumps(value)
    return text.replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).replace(f'"{DIGITS}"', "9" * 5_000)


def as_object(value: Any) -> Any:
    """The same for values that were no text."""
    if isinstance(value, dict):
        return {key: as_object(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_object(item) for item in value]
    if value == DIGITS:
        return 10**4000
    if value == DEEP:
        deep: Any = []
        for _ in range(50_000):
            deep = [deep]
        return deep
    return value


def damage(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Bytes of which some are others, or missing."""
    at = int(rng.integers(len(content)))
    damages = {
        "cut": content[:at],
        "invalid UTF-8": content[:at] + b"\xff\xc3" + content[at:],
        "NUL": content[:at] + b"\x00" + content[at:],
        "a bit": content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :],
        "empty": b"",
        "a mark": b"\xef\xbb\xbf" + content,
        "a line twice": content + content.splitlines(keepends=True)[-1],
        "a line break": content[:at] + b"\n" + content[at:],
    }
    name = _pick(list(damages), rng)
    return damages[name], f"{name} at {at}"


def _pick(items: Any, rng: np.random.Generator) -> Any:
    return items[int(rng.integers(len(items)))]


def lines_kind(name: str, text: str, read: Callable[[Path], tuple[Any, Any]], folder: Path) -> Kind:
    """A file of one JSON value a line."""
    rows = [json.loads(line) for line in text.splitlines()]
    return _file_kind(name, rows, text, lambda rows: "".join(f"{as_text(r)}\n" for r in rows), read, folder)


def json_kind(name: str, text: str, read: Callable[[Path], tuple[Any, Any]], folder: Path) -> Kind:
    """A file that is one JSON value."""
    return _file_kind(name, json.loads(text), text, as_text, read, folder)


def _file_kind(
    name: str,
    value: Any,
    text: str,
    written: Callable[[Any], str],
    read: Callable[[Path], tuple[Any, Any]],
    folder: Path,
) -> Kind:
    def mutated(rng: np.random.Generator) -> tuple[bytes, str]:
        if rng.random() < 0.15:
            return damage(text.encode(), rng)
        changed, described = mutate(value, rng)
        content = written(changed if isinstance(changed, list | dict) else [changed])
        return content.encode(), described

    def read_bytes(content: bytes) -> tuple[Any, Any]:
        path = folder / name.replace(" ", "_")
        path.write_bytes(content)
        return read(path)

    return Kind(name, mutated, read_bytes, text.encode())


def value_kind(name: str, value: Any, read: Callable[[Any], tuple[Any, Any]]) -> Kind:
    """A value that no text stands for: of a checkpoint, or handed over by the caller."""

    def mutated(rng: np.random.Generator) -> tuple[Any, str]:
        changed, described = mutate(value, rng)
        return as_object(changed), described

    return Kind(name, mutated, read, value)


def tiny_run(folder: Path) -> tuple[PrivacyAuditor, CanarySet, nn.Module]:
    """A table of next tokens, trained a little on preference pairs, and audited by several scores."""
    generator = np.random.default_rng(0)
    rows = [
        {"input_ids": chosen, "rejected_input_ids": rejected}
        for chosen, rejected in generator.integers(N_TOKENS, size=(48, 2, LENGTH)).tolist()
    ]
    train_rows, canaries = hold_out_canaries(rows, n_members=24, n_non_members=24, seed=0)
    model = nn.Embedding(LENGTH * N_TOKENS, N_TOKENS)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(generator.normal(size=model.weight.shape)))
    auditor = make_auditor(canaries, folder)
    auditor.begin(model)
    ids = torch.tensor([row["input_ids"] for row in train_rows])
    for _ in range(3):
        loss = nn.functional.cross_entropy(
            logits(model, ids, torch.ones_like(ids))[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        (gradient,) = torch.autograd.grad(loss, [model.weight])
        with torch.no_grad():
            model.weight -= 10.0 * gradient
        auditor.audit(model, step=10 * len(auditor.history), epoch=float(len(auditor.history)))
    return auditor, canaries, model


def logits(module: nn.Module, input_ids: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
    return module(input_ids + torch.arange(input_ids.shape[1]) * N_TOKENS)


def make_auditor(canaries: CanarySet, folder: Path | None) -> PrivacyAuditor:
    return PrivacyAuditor(
        canaries,
        budget=LeakageBudget(limit=0.95, rule="point"),
        logits_fn=logits,
        n_audits=3,
        restore=False,
        assume_seen=True,
        output_dir=folder,
    )


def mixed_canaries() -> tuple[CanarySet, CanarySet]:
    """Records of every shape; and synthetic ones, with details."""
    shapes: list[Callable[[int], Any]] = [
        lambda i: f"record {i} of the river",
        lambda i: {"text": f"record {i} of the field"},
        lambda i: {"input_ids": [5, 6, i], "labels": [-100, 6, i], "attention_mask": [1, 1, 1]},
        lambda i: {"prompt": f"question {i}", "completion": f"answer {i}"},
        lambda i: {
            "messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yes"}],
            "tools": [{"name": "look"}],
        },
        lambda i: {"chosen": f"good {i}", "rejected": f"bad {i}", "prompt": "p"},
    ]
    records = [shapes[i % len(shapes)](i) for i in range(24)]
    mixed = CanarySet.from_lists(records[:12], records[12:])
    mixed = replace(mixed, groups=tuple(f"person {i}" for i in range(24)))
    synthetic = CanarySet(
        tuple(f"secret {i}" for i in range(20)),
        np.arange(20) < 10,
        tuple(f"canary-{i}" for i in range(20)),
        Provenance("inserted_coins", True, 3, 20, 0, "abc"),
        tuple(CanaryDetails("bigram", 4, None, (i,) if i < 10 else (), 12.0) for i in range(20)),
    )
    return mixed, synthetic


def read_history(path: Path) -> tuple[Any, Any]:
    history = AuditHistory.load(path)
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    # Half a line at the end is what a killed process leaves.
    with suppress(ValueError):
        json.loads(last)
        lines.append(last)
    said = [json.loads(line) for line in lines if line]
    if len(history):
        summarize(history)
        render_report(to_document(history))
        for result in history:
            result.describe()
            result.to_metrics()
        json.dumps(to_document(history), allow_nan=False).encode()
    again = path.with_name("again")
    history.save(again)
    return [json.loads(line) for line in again.read_text().splitlines()], said


def read_canaries(path: Path) -> tuple[Any, Any]:
    canaries = load_canaries(path)
    canaries.describe()
    again = path.with_name("again")
    save_canaries(canaries, again)
    said = json.loads(path.read_text(encoding="utf-8"))
    # Other columns of a row never mattered.
    said["records"] = [canonical_record(record) for record in said["records"]]
    with suppress(AuditError):
        encode_canaries(canaries)
    return json.loads(again.read_text()), said


def kinds(folder: Path) -> list[Kind]:
    """Every kind of file that the package reads, as it writes them."""
    run = folder / "run"
    auditor, canaries, model = tiny_run(run)
    auditor.finish()
    history = auditor.history
    mixed, synthetic = mixed_canaries()
    save_canaries(mixed, folder / "mixed.json")
    save_canaries(synthetic, folder / "synthetic.json")
    note = {
        "run_id": history.run_metadata.run_id,
        "history": history.to_dicts(),
        "exposures": auditor.exposures_of_all.to_dict(),
        "judged_by": history.judged_by,
    }
    plain_note = json.loads(json.dumps(note))

    def resume(note: Any) -> tuple[Any, Any]:
        resumed = make_auditor(canaries, run)
        resumed.resume(
            model,
            note["history"],
            step=30,
            exposures=note["exposures"],
            judged_by=note["judged_by"],
            run_id=note["run_id"],
        )
        return _as_told(resumed.history.to_dicts(), note["history"]), note["history"]

    def read_note(path: Path) -> tuple[Any, Any]:
        notes = path.parent / "notes"
        notes.mkdir(exist_ok=True)
        path.replace(notes / "30-abcd.json")
        found = CheckpointNotes(notes, "abcd").read(30)
        # What is lost is said in a warning; the run then goes on with the history of its folder.
        return (None, None) if found is None else resume(found)

    def read_state(state: Any) -> tuple[Any, Any]:
        resumed = make_auditor(canaries, None)
        resumed.load_state_dict(state)
        if isinstance(state, dict) and state.get("reference") is None:
            return None, None
        said = {name: value for name, value in state.items() if name != "judged_by"}
        found = resumed.state_dict()
        del found["judged_by"]
        for name in ("exposures", "last_audit"):
            # What is lost is counted anew; a model that is not the last audit's any more is left out.
            if said.get(name) is None or found[name] is None:
                said.pop(name, None)
                del found[name]
        # Decisions are made anew where another budget had made them.
        return _without_decisions(found), _without_decisions(said)

    def read_report(path: Path) -> tuple[Any, Any]:
        content = path.read_text(encoding="utf-8", errors="surrogateescape")
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            return None, None  # the caller's own reading
        render_report(document).encode()
        # What is no character is shown as U+FFFD.
        return to_plain(from_plain(document)), with_characters(document)

    def read_part(kept: Any) -> tuple[Any, Any]:
        found = kept_in_state(kept)
        return ({} if found is None else asdict(found)), kept

    def read_records(path: Path) -> tuple[Any, Any]:
        target = path.with_suffix(".jsonl")
        path.replace(target)
        read_record_file(target).records()
        return None, None

    def read_run(state: Any) -> tuple[Any, Any]:
        arrays, names = state
        path = folder / "trajectories"
        save_arrays(path, arrays, {"schema": 2, **names}, digested=tuple(names))
        found = Trajectories.load(path)
        if found.n_audits > 1:
            with suppress(AuditError):
                most_exposed(found)
        return [list(found.score_names), list(found.record_ids), found.fingerprint], [
            names["score_names"],
            names["record_ids"],
            names["fingerprint"],
        ]

    def mutated_run(rng: np.random.Generator) -> tuple[Any, str]:
        found = Trajectories.load(run / "trajectories.safetensors")
        names = {
            "score_names": list(found.score_names),
            "record_ids": list(found.record_ids),
            "fingerprint": found.fingerprint,
        }
        arrays = {n: getattr(found, n) for n in ("steps", "epochs", "is_baseline", "is_member")}
        arrays |= {f"scores of {name}": scores for name, scores in found.scores.items()}
        if rng.random() < 0.5:
            changed, described = mutate(names, rng)
            changed = changed if isinstance(changed, dict) else {}
            return (
                arrays,
                {**dict.fromkeys(names), **changed},
            ), described
        changed_arrays, described = mutate_arrays(arrays, rng)
        return (changed_arrays, names), described

    def mutated_state(rng: np.random.Generator) -> tuple[Any, str]:
        state = auditor.state_dict()
        if rng.random() < 0.3:
            owner = _pick(["reference", "trajectories"], rng)
            scores = state[owner].get("scores", {})
            arrays = {
                name: value.numpy() for name, value in {**state[owner], **scores}.items() if name != "scores"
            }
            changed, described = mutate_arrays(arrays, rng)
            tensors: dict[str, Any] = {
                name: torch.from_numpy(np.array(value)) for name, value in changed.items()
            }
            if scores:
                tensors["scores"] = {name: tensors.pop(name) for name in scores}
            return {**state, owner: tensors}, f"{owner}: {described}"
        changed_state, described = mutate(state, rng)
        return as_object(changed_state), described

    def mutated_reference(rng: np.random.Generator) -> tuple[Any, str]:
        return damage((run / "reference.safetensors").read_bytes(), rng)

    fingerprint = auditor.state_dict()["fingerprint"]

    def read_reference(content: bytes) -> tuple[Any, Any]:
        path = folder / "reference"
        path.write_bytes(content)
        load_statistics(path, fingerprint=fingerprint)
        return None, None

    texts = "".join(json.dumps({"text": f"record {i}", "source": {"page": i}}) + "\n" for i in range(4))
    return [
        lines_kind("history", (run / "history.jsonl").read_text(), read_history, folder),
        json_kind("canaries", (folder / "mixed.json").read_text(), read_canaries, folder),
        json_kind("synthetic canaries", (folder / "synthetic.json").read_text(), read_canaries, folder),
        json_kind("note of a checkpoint", json.dumps(plain_note), read_note, folder),
        value_kind("audits handed to resume", plain_note, lambda note: _resumed(note, resume)),
        value_kind("trainer state", {"part": "abcd", "run": "0123abcd"}, read_part),
        Kind("state of the auditor", mutated_state, read_state),
        json_kind("report document", json.dumps(to_document(history)), read_report, folder),
        Kind("trajectories", mutated_run, read_run),
        Kind("reference", mutated_reference, read_reference),
        lines_kind("training records", texts, read_records, folder),
    ]


def _resumed(note: Any, resume: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    names = {"run_id", "history", "exposures", "judged_by"}
    # The caller's own names.
    return resume(note) if isinstance(note, dict) and note.keys() == names else (None, None)


def _as_told(found: list[dict[str, Any]], said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Audits as they were told where a finding names what was made of that: a verdict judged anew."""
    return [
        {**row, "decision": other["decision"], "findings": row["findings"][:-1]}
        if row["findings"] and row["findings"][-1]["name"] == CONTRADICTION
        else row
        for row, other in zip(found, said, strict=True)
    ]


def _without_decisions(state: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            **{name: row[name] for name in row if name != "decision"},
            "findings": [each for each in row["findings"] if each["name"] != CONTRADICTION],
        }
        for row in state["history"]
    ]
    return {**state, "history": rows}


def mutate_arrays(
    arrays: dict[str, np.ndarray], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of which one is of another shape, type or content."""
    name = _pick(list(arrays), rng)
    array = arrays[name]
    flat = array.astype(np.float64)
    changes: dict[str, Callable[[], np.ndarray]] = {
        "shorter": lambda: array[:-1],
        "empty": lambda: array[:0],
        "reversed": lambda: np.ascontiguousarray(array[::-1]),
        "another type": lambda: array.astype(_pick(["float64", "int32", "float16", "uint8", "bool"], rng)),
        "one more dimension": lambda: array[None],
        "without dimensions": lambda: array.reshape(-1)[0].copy(),
        "NaN": lambda: np.where(np.arange(flat.size).reshape(flat.shape) == 0, np.nan, flat),
        "infinity": lambda: np.where(np.arange(flat.size).reshape(flat.shape) == 1, np.inf, flat),
        "negative": lambda: -array if array.dtype != np.bool_ else ~array,
        "huge": lambda: np.full_like(array, np.finfo(array.dtype).max if array.dtype.kind == "f" else 1),
    }
    change = _pick(list(changes), rng)
    with np.errstate(all="ignore"):
        changed = np.asarray(changes[change]())
        if change in ("NaN", "infinity"):
            changed = changed.astype(array.dtype)
    return {**arrays, name: changed}, f"{name}: {change}"


def run(n: int, seed: int, *, only: str = "") -> dict[str, Counter[str]]:
    """The counts of outcomes of each kind of file; faults are printed."""
    logging.getLogger("ezmia_callbacks").setLevel(logging.CRITICAL)
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(kinds(Path(folder))):
            if only and only != kind.name:
                continue
            rng = np.random.default_rng([seed, number])
            counts[kind.name] = Counter()
            for _ in range(n):
                content, described = kind.mutated(rng)
                outcome = outcome_of(kind, content)
                counts[kind.name][outcome.name] += 1
                if outcome.name == "fault":
                    print(f"{kind.name}: {described!r:.160}: {outcome.detail}", file=sys.stderr)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000, help="mutations of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one kind of file")
    arguments = parser.parse_args()
    counts = run(arguments.n, arguments.seed, only=arguments.only)
    print("| File | As it says | Refused | Faults |\n|---|---|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {count['as it says']} | {count['refused']} | {count['fault']} |")
    return int(any(count["fault"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
