import json
from importlib import metadata
from pathlib import Path

import pytest

import ezmia_callbacks
from ezmia_callbacks.cli import doctor as doctor_module


def test_the_doctor_finds_this_environment_well(call, tmp_path):
    code, out, err = call("doctor", "--folder", tmp_path)
    content = json.loads(call("doctor", "--folder", tmp_path, "--json")[1])

    assert (code, err) == (0, "")
    assert "Everything works." in out
    found = {check["name"]: check for check in content["checks"]}
    assert content["is_well"]
    assert found["torch"]["found"] == metadata.version("torch")
    assert found["self-test"]["found"].startswith("AUC 0.500 before training, ")
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_names_what_needs_fixing(call, tmp_path, monkeypatch):
    versions = {"torch": "1.13.1", "transformers": None, "tqdm": None}
    real = metadata.version

    def version(name):
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(doctor_module.metadata, "version", version)
    (tmp_path / "file").touch()

    code, out, err = call("doctor", "--folder", tmp_path / "file" / "folder")

    assert (code, err) == (3, "")
    assert "Problems found: torch, tqdm, folder." in out
    assert "2.6 or newer is needed: pip install -U torch" in out
    assert 'pip install "ezmia-callbacks[huggingface]"' in out


@pytest.mark.parametrize(
    ("version", "minimum", "is_old"),
    [
        ("2.4.0+cpu", "2.4", False),
        ("2.13.0", "2.4", False),
        ("2.3.9", "2.4", True),
        ("4.46.dev0", "4.46", False),
    ],
)
def test_versions_are_compared_as_numbers(version, minimum, is_old):
    assert (doctor_module._release(version) < doctor_module._release(minimum)) == is_old


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("torch>=2.4", ("torch", "2.4", None)),
        ("scikit-learn>=1.4", ("scikit-learn", "1.4", None)),
        ("transformers>=4.46; extra == 'huggingface'", ("transformers", "4.46", "huggingface")),
        ('rich >= 13 ; extra == "report"', ("rich", "13", "report")),
        ("mkdocs<2,>=1.6; extra == 'dev'", ("mkdocs", "1.6", "dev")),
        ("jsonargparse[signatures]>=4.35; extra == 'dev'", ("jsonargparse", "4.35", "dev")),
        ("trl>=1.16; (python_version >= '3.11') and extra == 'dev'", ("trl", "1.16", "dev")),
        ("pyarrow", ("pyarrow", "0", None)),
    ],
)
def test_a_line_of_metadata_is_a_requirement(line, expected):
    assert doctor_module.requirement_of(line) == expected


def test_the_doctor_knows_what_pyproject_asks_for():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    file = Path(ezmia_callbacks.__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"]
    extras = {
        name: lines for name, lines in project["optional-dependencies"].items() if name not in ("all", "dev")
    }
    asked = {None: project["dependencies"], **extras}
    expected = {(*line.split(">="), extra) for extra, lines in asked.items() for line in lines}

    # If this fails, the environment has an older state of the package: install it again.
    assert set(doctor_module.requirements().values()) == expected


def test_every_requirement_is_checked_and_told_what_it_is_for(call, tmp_path):
    checks = json.loads(call("doctor", "--folder", tmp_path, "--json")[1])["checks"]

    advice = {check["name"]: check["advice"] for check in checks}
    for requirement in doctor_module.requirements().values():
        assert (advice[requirement.name] == "everything") == (requirement.extra is None)


def test_without_its_metadata_the_package_names_no_versions(call, tmp_path, monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor_module.metadata, "requires", requires)

    code, out, _ = call("doctor", "--folder", tmp_path)

    assert code == 0
    assert "versions are not checked" in out
