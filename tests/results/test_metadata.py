import pytest

from ezmia_callbacks.results.metadata import RunMetadata

AS_WRITTEN = {
    "started": "2026-01-01T00:00:00+00:00",
    "python": "3.11.7",
    "machine": "Linux x86_64",
    "command": "train.py --hub_token ***",
    "torch": "2.13.0",
    "canaries": "0123456789abcdef",
    "reference": "auto",
    "score": "ez",
    "audits planned": "4",
    "canaries in an audit": "45 of 90",
    "power of an audit": "An audit finds little.",
    "audited": "after the fact, from 3 saved models",
    "base model": "gpt2",
    "device": "cpu",
    "precision": "auto",
    "logits computed": "of scored positions only",
}


def test_the_versions_that_matter_are_there():
    metadata = RunMetadata.of_this_process()

    assert metadata.packages["torch"].startswith("2.")
    assert "numpy" in metadata.packages
    assert None not in (metadata.started, metadata.python, metadata.machine, metadata.command)


def test_what_a_file_says_becomes_typed_and_is_written_the_same_way_in_the_same_order():
    metadata = RunMetadata.from_dict(AS_WRITTEN)

    assert (metadata.n_planned_audits, metadata.n_scored, metadata.n_canaries) == (4, 45, 90)
    assert (metadata.n_checkpoints, metadata.packages) == (3, {"torch": "2.13.0"})
    assert list(metadata.to_dict().items()) == list(AS_WRITTEN.items())


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"audits planned": "unknown"},
        {"canaries in an audit": "all 300"},
        # Of another release, or written by hand: kept as it is.
        {"shoe size": "44", "audits planned": "a few", "canaries in an audit": "most", "audited": "twice"},
    ],
)
def test_nothing_that_a_file_says_is_lost(texts):
    assert RunMetadata.from_dict(texts).to_dict() == texts
