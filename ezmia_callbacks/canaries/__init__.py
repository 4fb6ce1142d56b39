"""Canaries: records with known membership, on which leakage is measured."""

from ezmia_callbacks.canaries.files import load_canaries, save_canaries
from ezmia_callbacks.canaries.hold_out import hold_out_canaries
from ezmia_callbacks.canaries.records import Record
from ezmia_callbacks.canaries.sets import CanaryDetails, CanarySet, Provenance, by_group
from ezmia_callbacks.canaries.synthetic.insertion import (
    insert_canaries,
    removal_list,
    save_removal_list,
    strip_canaries,
)
from ezmia_callbacks.canaries.validity.checks import ValidityReport, check_validity

__all__ = [
    "CanaryDetails",
    "CanarySet",
    "Provenance",
    "Record",
    "ValidityReport",
    "by_group",
    "check_validity",
    "hold_out_canaries",
    "insert_canaries",
    "load_canaries",
    "removal_list",
    "save_canaries",
    "save_removal_list",
    "strip_canaries",
]
