"""What was found, and how it is kept: an audit, a run's history, its records' trajectories, its metadata.

Plain data without torch: may import `functional`, `canaries` and `files`.
"""

from ezmia_callbacks.results.exposures import Exposures
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.results.metadata import RunMetadata
from ezmia_callbacks.results.result import AuditResult, EdgeCounts, Finding, Measurement
from ezmia_callbacks.results.trajectories import (
    DropList,
    ExposedRecord,
    ExposedRecords,
    NearCopy,
    Trajectories,
    drop_list,
    export_exposed,
    leakage_at_any_audit,
    most_exposed,
    rise_between,
)

__all__ = [
    "AuditHistory",
    "AuditResult",
    "DropList",
    "EdgeCounts",
    "ExposedRecord",
    "ExposedRecords",
    "Exposures",
    "Finding",
    "Measurement",
    "NearCopy",
    "RunMetadata",
    "Trajectories",
    "drop_list",
    "export_exposed",
    "leakage_at_any_audit",
    "most_exposed",
    "rise_between",
]
