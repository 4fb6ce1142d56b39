"""What is the same model as a checkpoint, and what only looks like it."""

import json
import shutil

import pytest
from adapters import edit_json, save_adapter
from safetensors.torch import load_file, save_file
from tiny import make_model

from ezmia_callbacks.post_hoc import find_checkpoints

pytestmark = pytest.mark.filterwarnings(
    # PEFT asks transformers 5 by the old name.
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    # PEFT looks for the base's configuration to see whether the vocabulary grew.
    "ignore:Could not find a config file:UserWarning",
)


@pytest.fixture
def full(tmp_path):
    """A run whose last model is that of its checkpoint."""
    for folder in (tmp_path / "run" / "checkpoint-3", tmp_path / "run"):
        make_model().save_pretrained(folder)
    return tmp_path / "run"


@pytest.fixture
def adapter(tmp_path):
    for folder in (tmp_path / "run" / "checkpoint-3", tmp_path / "run"):
        save_adapter(folder, base=None)
    return tmp_path / "run"


def names(folder):
    return [checkpoint.name for checkpoint in find_checkpoints(folder)]


def with_index(folder, shard="w.safetensors"):
    """The model in shards that are called anything, as an index may name them."""
    weights = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shard).parent.mkdir(exist_ok=True)
    weights.rename(folder / shard)
    return folder / shard


def scale(file):
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_same_model_is_audited_once_and_named(kind, request):
    folder = request.getfixturevalue(kind)

    (checkpoint,) = find_checkpoints(folder)

    assert checkpoint.name == "checkpoint-3"
    assert checkpoint.twins == (folder,)


def test_shards_of_any_name_are_compared(full):
    for folder in (full, full / "checkpoint-3"):
        with_index(folder, "parts/w.dat")

    assert names(full) == ["checkpoint-3"]
    scale(full / "parts" / "w.dat")
    assert names(full) == ["checkpoint-3", "run"]


def test_weights_that_no_pattern_knows_are_no_twins(full):
    for folder in (full, full / "checkpoint-3"):
        with_index(folder)
    scale(full / "w.safetensors")

    assert names(full) == ["checkpoint-3", "run"]


@pytest.mark.parametrize(
    ("kind", "file", "changes"),
    [
        ("adapter", "adapter_config.json", {"lora_alpha": 8000}),
        ("adapter", "adapter_config.json", {"base_model_name_or_path": "another"}),
        ("full", "config.json", {"activation_function": "relu"}),
        ("full", "config.json", {"auto_map": {"AutoModelForCausalLM": "other.Model"}}),
    ],
)
def test_another_configuration_is_another_model(kind, file, changes, request):
    folder = request.getfixturevalue(kind)
    edit_json(folder / file, **changes)

    assert names(folder) == ["checkpoint-3", "run"]


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "modeling.py"])
def test_a_file_more_is_another_model(name, full):
    (full / name).write_bytes(b"more")

    assert names(full) == ["checkpoint-3", "run"]


@pytest.mark.parametrize("content", ["{", '{"weight_map": []}', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_an_index_that_names_nothing_is_no_twin(content, full):
    for folder in (full, full / "checkpoint-3"):
        (folder / "model.safetensors.index.json").write_text(content)

    assert names(full) == ["checkpoint-3", "run"]


def test_folders_without_weights_are_no_twins(full):
    for folder in (full, full / "checkpoint-3"):
        (folder / "model.safetensors").unlink()

    assert names(full) == ["checkpoint-3", "run"]


def test_how_a_model_generates_and_what_the_trainer_left_do_not_count(full):
    (full / "generation_config.json").write_text('{"temperature": 2.0}')
    (full / "training_args.bin").write_bytes(b"arguments")
    (full / "checkpoint-3" / "optimizer.pt").write_bytes(b"moments")
    (full / "checkpoint-3" / "rng_state.pth").write_bytes(b"state")

    assert names(full) == ["checkpoint-3"]


def test_a_configuration_with_infinities_has_twins(full):
    for folder in (full, full / "checkpoint-3"):
        edit_json(folder / "config.json", time_step_limit=[0.0, float("inf")])

    assert names(full) == ["checkpoint-3"]


def test_a_configuration_that_is_nested_too_deeply_is_no_twin(full):
    for folder in (full, full / "checkpoint-3"):
        (folder / "config.json").write_text("[" * 100_000)

    assert names(full) == ["checkpoint-3", "run"]


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [("1.5", 1.5), ("NaN", None), ("Infinity", None), ("9" * 400, None), ("true", None), ('"1"', None)],
)
def test_what_a_trainer_says_of_its_epoch_is_a_number_or_unknown(epoch, expected, full):
    """It also writes losses, which are no numbers where a run diverged."""
    shutil.rmtree(full / "checkpoint-3")
    state = f'{{"epoch": {epoch}, "global_step": 7, "log_history": [{{"loss": NaN}}]}}'
    (full / "trainer_state.json").write_text(state)

    (checkpoint,) = find_checkpoints(full)

    assert (checkpoint.epoch, checkpoint.step) == (expected, 7)


@pytest.mark.parametrize("step", ["true", "-1", "9" * 30, "1.5", "NaN"])
def test_a_step_that_is_none_is_unknown(step, full):
    shutil.rmtree(full / "checkpoint-3")
    (full / "trainer_state.json").write_text(f'{{"epoch": 1.0, "global_step": {step}}}')

    assert [checkpoint.step for checkpoint in find_checkpoints(full)] == [1]


def test_an_adapter_and_a_whole_model_in_one_folder_are_refused(full):
    save_adapter(full / "more", base=None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(full / "more" / name, full / name)

    with pytest.raises(ValueError, match=r"holds both a whole model \(model.safetensors\) and an adapter"):
        find_checkpoints(full)


def test_adapters_with_names_are_checkpoints_of_their_own(tmp_path):
    for step in (3, 6):
        save_adapter(tmp_path / f"checkpoint-{step}", base=None, seed=step, names=("default", "other"))
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"epoch": 0.5}')
    save_adapter(tmp_path, base=None, seed=6, names=("default", "other"))
    edit_json(tmp_path / "other" / "adapter_config.json", lora_alpha=80)

    checkpoints = find_checkpoints(tmp_path)

    assert [(c.name, c.step) for c in checkpoints] == [
        ("checkpoint-3", 3),
        ("checkpoint-3/other", 3),
        ("checkpoint-6", 6),
        ("checkpoint-6/other", 6),
        ("other", 6),
    ]
    assert {c.epoch for c in checkpoints[:-1]} == {0.5}
    assert checkpoints[2].twins == (tmp_path,)


def test_a_folder_that_holds_nothing_but_a_named_adapter_is_that_adapter(tmp_path):
    save_adapter(tmp_path / "run", base=None, names=("mine",))

    assert names(tmp_path / "run") == ["mine"]
    assert all(checkpoint.is_adapter for checkpoint in find_checkpoints(tmp_path / "run"))


def test_whole_models_below_the_folder_are_named_and_not_audited(full, caplog):
    make_model(seed=2).save_pretrained(full / "best")

    assert names(full) == ["checkpoint-3"]
    assert "Not audited, though they hold models: best in" in caplog.text
