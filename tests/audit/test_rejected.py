import torch
from tiny import make_model
from torch import nn

from ezmia_callbacks.audit.rejected import describe_folder, save_rejected


def test_a_model_that_can_save_itself_does_so(tmp_path):
    model = make_model()

    folder = save_rejected(model, tmp_path, step=7)

    assert folder == tmp_path / "step-7"
    loaded = make_model(seed=1).from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_any_other_is_written_as_tensors_and_beside_what_is_there(tmp_path):
    from safetensors.torch import load_file

    model = nn.Linear(2, 3)
    start = model.weight.detach().clone()
    folders = []
    for _ in range(3):
        folders.append(save_rejected(model, tmp_path, step=7))
        model.weight.data.mul_(2)

    assert [folder.name for folder in folders] == ["step-7", "step-7-2", "step-7-3"]
    for i, folder in enumerate(folders):
        assert torch.equal(load_file(folder / "weights-0.safetensors")["weight"], start * 2**i)


def test_the_folder_says_what_it_holds_and_is_its_owners_alone(tmp_path):
    save_rejected(make_model(), tmp_path / "over_budget", step=7)
    describe_folder(tmp_path / "over_budget")

    text = (tmp_path / "over_budget" / "README.md").read_text()
    assert "Do not publish or deploy it" in text
    for path in (tmp_path / "over_budget").rglob("*"):
        assert path.stat().st_mode & 0o77 == 0, path
