import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest
from public_packages import PUBLIC

import ezmia_callbacks
from ezmia_callbacks import functional

HEAVY = (
    "torch",
    "transformers",
    "lightning",
    "pytorch_lightning",
    "datasets",
    "matplotlib",
    "typer",
    "tqdm",
    "scipy.stats",
    "jaxtyping",
)
# Axolotl cannot be installed without its GPU stack; its plugin has tests of its own.
MODULES = sorted(
    {module.name for module in pkgutil.walk_packages(ezmia_callbacks.__path__, "ezmia_callbacks.")}
    - {"ezmia_callbacks.axolotl"}
)


def loaded_after(statement: str, packages: tuple[str, ...]) -> set[str]:
    """Which of the packages a fresh interpreter has loaded after a statement."""
    script = f"import sys\n{statement}\nprint(*(p for p in {packages!r} if p in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def import_without_jaxtyping(modules: list[str]) -> str:
    """What a fresh interpreter without jaxtyping says when it imports the modules; empty if all went well."""
    script = (
        "import sys\nfrom importlib import import_module\nsys.modules['jaxtyping'] = None\n"
        f"for name in {modules!r}:\n    import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr


def test_public_names_are_exactly_those_that_can_be_imported():
    own = {
        name
        for name in dir(ezmia_callbacks)
        if not name.startswith("_")
        and not isinstance(value := getattr(ezmia_callbacks, name), ModuleType)
        and getattr(value, "__module__", "").startswith("ezmia_callbacks")
    }

    assert own == set(ezmia_callbacks.__all__)


@pytest.mark.parametrize("module", [ezmia_callbacks, functional], ids=lambda module: module.__name__)
def test_public_names_are_listed_once_and_exist(module):
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_public_names_of_the_package_are_sorted():
    assert list(ezmia_callbacks.__all__) == sorted(ezmia_callbacks.__all__)


@pytest.mark.parametrize("name", ezmia_callbacks.__all__)
def test_public_names_say_what_they_are(name):
    value = getattr(ezmia_callbacks, name)

    assert value.__doc__
    # A dataclass without a docstring gets its signature for one.
    assert not value.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("name", functional.__all__)
def test_functions_say_what_they_return(name):
    value = getattr(functional, name)

    if inspect.isfunction(value) or inspect.isclass(value):
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}(")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'ezmia_callbacks' has no attribute 'PrivacyAudit'"):
        ezmia_callbacks.PrivacyAudit  # noqa: B018


def test_importing_the_package_loads_no_framework():
    assert loaded_after("import ezmia_callbacks", HEAVY) == set()


def test_each_framework_has_its_own_callback():
    callbacks = (ezmia_callbacks.PrivacyAuditCallback, ezmia_callbacks.LightningPrivacyAuditCallback)

    modules = [f"{callback.__module__}.{callback.__name__}" for callback in callbacks]

    assert modules == [
        "ezmia_callbacks.huggingface.PrivacyAuditCallback",
        "ezmia_callbacks.lightning.PrivacyAuditCallback",
    ]


def test_the_probe_for_loaded_packages_sees_what_is_loaded():
    assert loaded_after("import tqdm.std", HEAVY) == {"tqdm"}


def test_modules_without_torch_import_without_jaxtyping():
    names = [
        "ezmia_callbacks",
        *(f"ezmia_callbacks.{name}" for name in ("scoring.rows", "measuring.figures")),
    ]

    assert import_without_jaxtyping(names) == ""


def test_the_probe_without_jaxtyping_sees_an_import_of_it():
    assert "jaxtyping" in import_without_jaxtyping(["jaxtyping"])


@pytest.mark.slow
def test_every_module_imports_without_jaxtyping():
    assert "ezmia_callbacks.huggingface" in MODULES
    assert import_without_jaxtyping(MODULES) == ""


@pytest.mark.parametrize("name", MODULES)
def test_only_public_modules_export_anything_and_what_they_list_is_there(name):
    module = import_module(name)

    listed = module.__all__

    assert [each for each in listed if not hasattr(module, each)] == []
    assert bool(listed) is (name in PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"ezmia_callbacks", "ezmia_callbacks.demo"}))
def test_public_names_say_what_they_are_and_where_they_belong(name):
    module = import_module(name)

    for listed in module.__all__:
        value = getattr(module, listed)
        if callable(value):
            assert value.__doc__, listed


@pytest.mark.parametrize(
    "module",
    [
        "audit.judge",
        "audit.economy",
        "audit.settings",
        "measuring.figures",
        "measuring.split_checks",
        "results",
    ],
)
def test_the_parts_that_need_no_torch_load_none(module):
    assert "torch" not in loaded_after(f"import ezmia_callbacks.{module}", HEAVY)


def test_scoring_itself_loads_no_torch():
    assert "torch" not in loaded_after("from ezmia_callbacks.scoring import Attack, SCORES", HEAVY)
