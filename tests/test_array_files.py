import json

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from ezmia_callbacks.array_files import UNREADABLE, load_arrays, save_arrays

ARRAYS = {"steps": np.arange(3), "scores": np.linspace(0.0, 1.0, 6).reshape(2, 3).T, "is_member": np.ones(0)}
METADATA = {"schema": 1, "score": "ez", "record_ids": ["a", "ä"]}


def test_a_file_gives_back_its_arrays_and_metadata(tmp_path):
    save_arrays(tmp_path / "folder" / "file", ARRAYS, METADATA, digested=("score", "record_ids"))

    actual = load_arrays(tmp_path / "folder" / "file", tuple(ARRAYS))

    assert actual.metadata.items() >= METADATA.items()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(actual.arrays[name], array)
        assert actual.arrays[name].dtype == array.dtype
    assert actual.is_intact(digested=("score", "record_ids"))


def rewrite(path, arrays, metadata):
    """Write the file again with another content under the digest that it has."""
    digest = load_arrays(path, tuple(arrays)).metadata["sha256"]
    content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(content, path, metadata={"ezmia": json.dumps({**metadata, "sha256": digest})})
    return load_arrays(path, tuple(arrays))


def test_an_array_that_was_changed_is_noticed(tmp_path):
    save_arrays(tmp_path / "file", ARRAYS, METADATA)
    assert rewrite(tmp_path / "file", ARRAYS, METADATA).is_intact()

    actual = rewrite(tmp_path / "file", {**ARRAYS, "steps": np.array([0, 1, 3])}, METADATA)

    assert not actual.is_intact()


def test_only_metadata_that_the_digest_covers_is_checked(tmp_path):
    save_arrays(tmp_path / "file", ARRAYS, METADATA, digested=("score",))
    digested = ("score",)

    other_schema = rewrite(tmp_path / "file", ARRAYS, {**METADATA, "schema": 2})
    other_score = rewrite(tmp_path / "file", ARRAYS, {**METADATA, "score": "loss"})

    assert other_schema.is_intact(digested=digested)
    assert not other_score.is_intact(digested=digested)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"half of a file",
        save(ARRAYS | {"scores": np.zeros(3)}),
        save({"steps": np.arange(3)}, metadata={"ezmia": "{}"}),
        save({"steps": np.arange(3)}, metadata={"ezmia": "{"}),
    ],
    ids=["empty", "torn", "no metadata", "an array is missing", "no JSON"],
)
def test_another_file_is_unreadable(content, tmp_path):
    (tmp_path / "file").write_bytes(content)

    with pytest.raises(UNREADABLE):
        load_arrays(tmp_path / "file", tuple(ARRAYS))


def test_a_missing_file_is_named_as_such(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "file", tuple(ARRAYS))
