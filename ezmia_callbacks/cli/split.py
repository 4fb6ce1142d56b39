"""`ezmia split`: a file of records into a training file and canaries."""

from pathlib import Path
from typing import Annotated

import typer

from ezmia_callbacks.canaries.files import save_canaries
from ezmia_callbacks.canaries.hold_out import hold_out_canaries
from ezmia_callbacks.canaries.record_files import ENDINGS, RecordFile, ending_of, read_record_file
from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.cli.terminal import JsonOption, say, say_json
from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.files import write_atomically
from ezmia_callbacks.functional.sizes import audit_reach

__all__: list[str] = []


def split(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help=f"Training records: {ENDINGS}. A .txt file has one a paragraph if there are blank lines, "
            "else one a line.",
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Folder for the training file and canaries.json.")
    ],
    members: Annotated[
        int | None, typer.Option("--members", help="Canaries that stay in the training file, 10 or more.")
    ] = None,
    non_members: Annotated[
        int | None, typer.Option("--non-members", help="Canaries to hold out of it, 10 or more.")
    ] = None,
    coins: Annotated[
        int | None,
        typer.Option(
            "--coins",
            help="Instead of both: number of records to flip a fair coin for, 50 or more. Only coin flips "
            "allow a lower bound on epsilon.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed of the draw.")] = 0,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", help="Column that holds the text, if it is not called `text`."),
    ] = None,
    is_forced: Annotated[
        bool, typer.Option("--force", help="Overwrite what an earlier split left in the folder.")
    ] = False,
    is_json: JsonOption = False,
) -> None:
    """Draw canaries from a training file: some stay in it (members), some are held out (non-members).

    Train on the new file, and measure with canaries.json, during the run (`load_canaries`) or afterwards
    (`ezmia audit`). The same file and seed give the same split. Which records were held out is in
    canaries.json, together with their text. Both files can be read by you alone.

    Without --members and --non-members, non-members are a tenth of the records, at most 1000, and members
    twice as many, at most 500. `ezmia plan` says how many canaries a budget needs.

    Example: ezmia split data.jsonl -o split
    """
    if (members is None) != (non_members is None) or (coins is not None and members is not None):
        raise ConfigurationError(
            "Say how many canaries to draw by --members and --non-members together, or by --coins alone, or "
            "leave out all three: the number of records decides then."
        )
    file = read_record_file(data)
    train_path, canaries_path = output_dir / f"train{ending_of(data)}", output_dir / "canaries.json"
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigurationError(f"--output-dir {str(output_dir)!r} is a file; a folder is needed.")
    _check_targets((train_path, canaries_path), source=data, is_forced=is_forced)
    records = file.records(text_column=text_column)
    _, canaries = hold_out_canaries(
        records, n_members=members, n_non_members=non_members, n_canaries=coins, seed=seed
    )
    kept = _kept_rows(file, canaries)
    # The canaries first: a training file without them could not be audited any more.
    save_canaries(canaries, canaries_path)
    write_atomically(train_path, file.content_of(kept))
    reach = audit_reach(canaries.n_members, canaries.n_non_members)
    if is_json:
        say_json(
            {
                "train_file": str(train_path),
                "canaries_file": str(canaries_path),
                "n_rows": len(file.rows),
                "n_rows_kept": len(kept),
                "n_members": canaries.n_members,
                "n_non_members": canaries.n_non_members,
                "seed": seed,
                "fingerprint": canaries.fingerprint,
                "reach": reach.to_dict(),
            }
        )
        return
    say(f"Canaries: {canaries.describe()}")
    say(f"{canaries_path}: {canaries.n_members} members, {canaries.n_non_members} non-members")
    say(f"{train_path}: {len(kept)} of {len(file.rows)} rows, including the members")
    say(reach.describe())
    say(f"Train on {train_path}, then run: ezmia audit RUN --base MODEL --canaries {canaries_path}")


def _check_targets(targets: tuple[Path, ...], *, source: Path, is_forced: bool) -> None:
    for target in targets:
        if not target.exists():
            continue
        if target.samefile(source):
            raise ConfigurationError(f"{str(target)!r} is the file to be split: choose another --output-dir.")
        if not is_forced:
            raise ConfigurationError(
                f"{str(target)!r} exists, and a new split would make it useless for runs that used it: "
                "choose another --output-dir, or --force."
            )


def _kept_rows(file: RecordFile, canaries: CanarySet) -> list[int]:
    """Indices of the rows that are trained on."""
    is_held_out = {
        record_id
        for record_id, is_member in zip(canaries.record_ids, canaries.is_member, strict=True)
        if not is_member
    }
    return [i for i in range(len(file.rows)) if f"row-{i}" not in is_held_out]
