"""Every error this package raises on purpose.

    AuditError
    ├── ConfigurationError       (ValueError)   an argument that can never work
    ├── CanaryError              (ValueError)   canaries that cannot carry a measurement
    │   ├── EmptyRecordError                    a record without text or tokens
    │   ├── OverlappingCanariesError            a record that is both a member and a non-member
    │   └── TooFewCanariesError                 too few records for the figure that was asked for
    ├── UnsupportedModelError    (TypeError)    a model whose token log-probabilities cannot be read
    │   └── ModelChangedError               an audit changed the model, and it could not be put back
    ├── BrokenPassError                         a pass through a sharded model broke off on a process
    ├── NonFiniteLogitsError     (ArithmeticError)  NaN or infinity where a probability is needed
    ├── AuditMemoryError         (MemoryError)  one record alone does not fit into memory
    ├── ReferenceMismatchError                  the reference is missing or belongs to another run
    └── MissingDependencyError   (ImportError)  an optional package is not installed

Each message says what was got, what is needed, and what to do.
"""

__all__ = [
    "AuditError",
    "AuditMemoryError",
    "BrokenPassError",
    "CanaryError",
    "ConfigurationError",
    "EmptyRecordError",
    "MissingDependencyError",
    "ModelChangedError",
    "NonFiniteLogitsError",
    "OverlappingCanariesError",
    "ReferenceMismatchError",
    "TooFewCanariesError",
    "UnsupportedModelError",
]


class AuditError(Exception):
    """Base class of all errors of this package."""


class ConfigurationError(AuditError, ValueError):
    """An argument is outside its range, or arguments contradict each other."""


class CanaryError(AuditError, ValueError):
    """The canary records cannot carry the measurement."""


class EmptyRecordError(CanaryError):
    """A record has no text, or no tokens."""


class OverlappingCanariesError(CanaryError):
    """A record stands on both sides of the member / non-member split."""


class TooFewCanariesError(CanaryError):
    """There are too few records to resolve the figure that was asked for."""


class UnsupportedModelError(AuditError, TypeError):
    """The model is not a causal language model that returns logits."""


class ModelChangedError(UnsupportedModelError):
    """An audit changed the model and could not put it back: raised whatever `on_error` says.

    Training that went on would train another model, and save it.
    """


class BrokenPassError(AuditError):
    """A pass through a sharded model broke off on a process: raised whatever `on_error` says.

    The processes do not agree any more what they exchange, so that no training can go on with them.
    """


class NonFiniteLogitsError(AuditError, ArithmeticError):
    """The model returned NaN or infinite logits."""


class AuditMemoryError(AuditError, MemoryError):
    """The audit does not fit into memory, even one record at a time.

    Not a RuntimeError: trainers that look for a batch size would make the training batch smaller for it.
    """


class ReferenceMismatchError(AuditError):
    """The reference statistics are missing, or were made for other canaries."""


class MissingDependencyError(AuditError, ImportError):
    """An optional package is needed and not installed."""
