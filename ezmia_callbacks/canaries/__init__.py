"""Canaries: records with known membership, on which leakage is measured."""

from ezmia_callbacks.canaries.hold_out import hold_out_canaries
from ezmia_callbacks.canaries.records import Record
from ezmia_callbacks.canaries.sets import CanarySet, Provenance

__all__ = ["CanarySet", "Provenance", "Record", "hold_out_canaries"]
