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
    └── MissingDependencyError   (ImportError)  an optional package is not installed, or is broken

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
    """An optional package is needed, and is not installed, or cannot be imported although it is."""

    @classmethod
    def because(cls, error: Exception, package: str, advice: str) -> "MissingDependencyError":
        """The error to raise where an import failed: what to install, or what is broken.

        Args:
            error: What the import raised.
            package: What was imported, by its dotted name.
            advice: What needs it, and what to install if it is not there.

        >>> missing = ModuleNotFoundError("No module named 'transformers'", name="transformers")
        >>> print(MissingDependencyError.because(missing, "transformers", "pip install transformers"))
        pip install transformers
        >>> broken = ModuleNotFoundError("No module named 'regex'", name="regex")
        >>> print(MissingDependencyError.because(broken, "transformers", "pip install transformers"))
        transformers is installed and cannot be imported: ModuleNotFoundError: No module named 'regex'.
        """
        if isinstance(error, ModuleNotFoundError) and f"{package}.".startswith(f"{error.name}."):
            return cls(advice)
        first: BaseException = error
        # Packages that load their parts lazily say only which part could not be loaded.
        while first.__cause__ is not None:
            first = first.__cause__
        reason = " ".join(str(first).split()).rstrip(".")
        return cls(f"{package} is installed and cannot be imported: {type(first).__name__}: {reason}.")
