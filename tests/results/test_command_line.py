import sys

import pytest

from ezmia_callbacks.results.command_line import without_values
from ezmia_callbacks.results.metadata import RunMetadata


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], ""),
        # Numbers and truth values are harmless; names of options are the program's own.
        (["--lr", "1e-4", "--epochs=3", "--bf16", "true"], "--lr 1e-4 --epochs=3 --bf16 true"),
        (["--bias", "-5", "--decay", "-.5e-3", "-0.01"], "--bias -5 --decay -.5e-3 -0.01"),
        (["--fp16=False", "--limit", "None", "--no-restore"], "--fp16=False --limit None --no-restore"),
        (["-n", "4", "-v"], "-n 4 -v"),
        # Anything else may be a text, a path, a name or a secret.
        (["--prompt", "My number is 42"], "--prompt …"),
        (["--prompt=My number is 42"], "--prompt=…"),
        (["--prompt", "two\nlines=1"], "--prompt …"),
        (["--data", "/home/ann/patients.jsonl"], "--data …"),
        (["--names", "Ann", "Bob", "3"], "--names … … 3"),
        (["patients.jsonl", "7"], "… 7"),
        (["--empty="], "--empty="),
        (["--empty", ""], "--empty …"),
        (["@arguments.txt"], "…"),
        # Keys of overrides, as in Hydra, are names of options; what is no such key is a text.
        (["adam.beta1=0.9", "+model/name=llama", "++x=true"], "adam.beta1=0.9 +model/name=… ++x=true"),
        (["~callbacks.early"], "…"),
        (["Ann Smith=ill"], "…"),
        (["aGVsbG8gd29ybGQ=", "c2VjcmV0==", "abcd=="], "… … …"),
        (["Ab3=1"], "…"),
        # What stands right behind a short option is its value.
        (["-phunter2", "-n4", "-lr", "1e-4"], "-p… -n4 -l… 1e-4"),
        (["-p=hunter2", "-n=4"], "-p=… -n=4"),
        # What is no option at all, though it begins like one.
        (["-----BEGIN KEY-----"], "…"),
        (["--My number is 42=1", "--", "--text", "-"], "… -- … …"),
        (["--ünder", "--x" * 40], "… …"),
        # A number may be a secret, or long enough to tell who somebody is.
        (["--hub_token", "12345", "--seed", "1"], "--hub_token … --seed 1"),
        (["--api-key=12345", "WANDB_API_KEY=7", "--pin", "1234"], "--api-key=… … --pin …"),
        (["--password", "--hunter2", "3"], "--password … 3"),
        (["--phone", "4915112345678", "123456789"], "--phone … …"),
        (["--year", "٢٠٢٥"], "--year …"),
    ],
)
def test_options_are_shown_and_values_only_where_they_are_harmless(arguments, shown):
    assert without_values(["train.py", *arguments]) == f"train.py {shown}".rstrip()


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("train.py", "train.py"),
        ("/home/ann/patients/train.py", "train.py"),
        (r"C:\Users\Ann\train.py", "train.py"),
        ("-c", "-c"),
        ("", "…"),
    ],
)
def test_a_program_is_shown_by_its_name(program, shown):
    assert without_values([program, "--lr", "1"]) == f"{shown} --lr 1"


def test_no_arguments_at_all_are_no_command():
    assert without_values([]) == ""


def test_the_metadata_of_a_run_hold_the_command_without_values(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/ann/train.py", "--text", "My number is 42"])

    assert RunMetadata.of_this_process().command == "train.py --text …"


@pytest.mark.parametrize("option", ["--pass", "--passcode", "--passphrase", "--db-pass"])
def test_words_for_a_password_are_secrets_too(option):
    assert without_values(["train.py", option, "1234", "--passes", "3"]) == f"train.py {option} … --passes 3"
