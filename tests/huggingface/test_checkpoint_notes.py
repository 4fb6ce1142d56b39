"""What a checkpoint needs to go on, in files of the audit's own folder."""

import pytest

from ezmia_callbacks.huggingface.checkpoint_notes import CheckpointNotes


def note(n):
    return {"run_id": "a", "history": [], "exposures": {"n": n}, "judged_by": {}}


def n_of(notes, step):
    return notes.read(step)["exposures"]["n"]


def test_the_newest_note_that_is_not_of_later_is_read(tmp_path):
    notes = CheckpointNotes(tmp_path, "one")
    for step in (10, 20, 100):
        notes.write(step, note(step), checkpoints=(10, 20))

    assert [n_of(notes, step) for step in (10, 15, 20, 99, 100)] == [10, 10, 20, 20, 100]


def test_parts_that_went_on_from_one_checkpoint_do_not_take_each_others_notes(tmp_path):
    first, second = CheckpointNotes.anew(tmp_path), CheckpointNotes.anew(tmp_path)
    first.write(30, note("first"), checkpoints=(30,))
    second.write(20, note("second"), checkpoints=(30,))

    assert first.part != second.part
    assert n_of(first, 30) == "first"
    assert n_of(second, 30) == "second"


def test_notes_that_no_checkpoint_needs_any_more_go(tmp_path):
    notes = CheckpointNotes(tmp_path, "one")
    for step in (10, 20, 30):
        notes.write(step, note(step), checkpoints=(10, 20, 30))

    notes.write(40, note(40), checkpoints=(25, 40))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["20-one.json", "40-one.json"]


@pytest.mark.parametrize("content", [None, b"", b"half {", b'{"history": []}', b"[]", b"\xff"])
def test_a_note_that_is_lost_or_damaged_is_named(tmp_path, caplog, content):
    notes = CheckpointNotes(tmp_path, "one")
    if content is not None:
        (tmp_path / "7-one.json").write_bytes(content)

    assert notes.read(8) is None
    assert "What the checkpoint of step 8 was fed is lost" in caplog.text


def test_a_full_disk_is_named_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")

    CheckpointNotes(tmp_path / "file", "one").write(8, note(8), checkpoints=())

    assert "What the checkpoint of step 8 needs to go on was not written" in caplog.text
