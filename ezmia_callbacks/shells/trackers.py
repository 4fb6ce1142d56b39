"""What an audit tells the user's experiment trackers beside its curves: its settings and its verdicts.

Trackers are known by what they have, not by their class, so that none of them is imported: reporting
callbacks of a Hugging Face trainer and loggers of a Lightning one. Others are passed over. Curves go the
framework's own way. To be called on the main process only.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from ezmia_callbacks.audit.settings import AuditSettings
from ezmia_callbacks.results.history import AuditHistory
from ezmia_callbacks.safe_text import get_logger

__all__: list[str] = []

logger = get_logger(__name__)

# Private here are `_ml_flow`, `_wandb` and `_trackio` of transformers' reporting callbacks, tried with
# transformers 4.46.3 (the first two) and 5.23.0; where one is missing its tracker is passed over. They stay
# in this file because Lightning's loggers are told the same by the same functions.

# Trackers that have failed, for as long as they live.
_WARNED_OF: WeakSet[object] = WeakSet()

# What MLflow takes; the others take more.
_LONGEST_SETTING, _LONGEST_TAG = 250, 5000


def audit_settings(history: AuditHistory, settings: AuditSettings) -> dict[str, str]:
    """The audit's hyper-parameters by name, as text: what was measured how, and under which budget.

    Args:
        history: The run's history, as the auditor begins it.
        settings: What the user chose.

    >>> audit_settings(AuditHistory(), AuditSettings(every=100))
    {'confidence': '0.95', 'budget': 'none', 'every': '100', 'restore': 'True'}
    """
    metadata, budget = history.run_metadata, history.budget
    named: dict[str, object] = {
        "score": metadata.score,
        "reference": metadata.reference,
        "canaries": metadata.canaries,
        "audits_planned": metadata.n_planned_audits,
        "confidence": history.confidence,
        "budget": "none" if budget is None else budget.describe(),
    }
    if budget is not None:
        named |= {
            "budget_metric": budget.name,
            "budget_limit": budget.limit,
            "budget_rule": budget.rule,
            "budget_confidence": budget.confidence,
            "budget_patience": budget.patience,
        }
    named |= {"about": history.about or None, "every": settings.cadence, "restore": settings.restore}
    return {name: str(value) for name, value in named.items() if value is not None}


def log_settings(trackers: Iterable[object], settings: Mapping[str, str], *, prefix: str) -> None:
    """Write the audit's settings once, before its first figures: Trackio keeps none that come later.

    TensorBoard has them as a table of text, MLflow as parameters, Weights & Biases and Trackio in the run's
    configuration, Lightning's CSV logger in `hparams.yaml`, and any other Lightning logger where it keeps
    hyper-parameters. A tracker that fails is logged about and ends nothing.

    Args:
        trackers: Reporting callbacks or loggers.
        settings: Texts by name.
        prefix: Put before every name.
    """
    named = {f"{prefix}{name}": value for name, value in settings.items()}
    for tracker in trackers:
        try:
            _log_settings(tracker, named, prefix=prefix)
        except Exception as error:  # trackers have no common parent for what a lost connection raises
            _warn(tracker, error)


def log_verdict(trackers: Iterable[object], text: str, *, prefix: str, step: int) -> None:
    """Write an audit's verdict as text.

    TensorBoard and Trackio keep those of all audits, by step; MLflow (a tag), Weights & Biases (the
    summary) and Lightning's CSV logger (`hparams.yaml`) the last one. A tracker that fails is logged about
    and ends nothing.

    Args:
        trackers: Reporting callbacks or loggers.
        text: `AuditResult.describe()`.
        prefix: Put before the name, which is "verdict".
        step: Optimizer steps done.
    """
    for tracker in trackers:
        try:
            _log_verdict(tracker, text, name=f"{prefix}verdict", step=step)
        except Exception as error:  # as above
            _warn(tracker, error)


def _log_settings(tracker: Any, named: Mapping[str, str], *, prefix: str) -> None:
    writer = _tensorboard_writer(tracker)
    if writer is not None:
        # Markdown, as TensorBoard shows text; a bar would end the cell.
        rows = [f"| {name} | {value.replace('|', '/')} |" for name, value in named.items()]
        writer.add_text(f"{prefix}settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
        writer.flush()
    elif _has(tracker, "_ml_flow"):
        tracker._ml_flow.log_params({name: value[:_LONGEST_SETTING] for name, value in named.items()})
    elif _has(tracker, "_wandb"):
        tracker._wandb.run.config.update(dict(named), allow_val_change=True)
    elif _has(tracker, "_trackio"):
        tracker._trackio.config.update(dict(named))
    elif _has(tracker, "log_hyperparams"):
        # Not TensorBoard's, above: with them comes a curve `hp_metric`.
        tracker.log_hyperparams(dict(named))


def _log_verdict(tracker: Any, text: str, *, name: str, step: int) -> None:
    writer = _tensorboard_writer(tracker)
    run: Any = getattr(tracker, "experiment", None) if _has(tracker, "log_hyperparams") else None
    if writer is not None:
        writer.add_text(name, text, step)
        writer.flush()
    elif _has(tracker, "_ml_flow"):
        tracker._ml_flow.set_tag(name, text[:_LONGEST_TAG])
    elif _has(tracker, "_wandb"):
        tracker._wandb.run.summary[name] = text
    elif _has(tracker, "_trackio"):
        tracker._trackio.log({name: text, "train/global_step": step})
    elif _has(run, "set_tag"):
        run.set_tag(tracker.run_id, name, text[:_LONGEST_TAG])
    elif _has(run, "summary"):
        run.summary[name] = text
    elif _has(run, "log_hparams"):
        tracker.log_hyperparams({name: text})


def _tensorboard_writer(tracker: Any) -> Any:
    """The `SummaryWriter` of a reporting callback or a logger; None if it has none."""
    writer = getattr(tracker, "tb_writer", None)
    if writer is None and _has(tracker, "log_hyperparams"):
        writer = getattr(tracker, "experiment", None)
    return writer if _has(writer, "add_text") and _has(writer, "add_scalar") else None


def _has(thing: object, name: str) -> bool:
    return getattr(thing, name, None) is not None


def _warn(tracker: object, error: Exception) -> None:
    # It mostly fails at every audit. What cannot be in such a set is warned of each time.
    with suppress(TypeError):
        if tracker in _WARNED_OF:
            return
        _WARNED_OF.add(tracker)
    logger.warning("%s did not take the privacy audit's text: %s", type(tracker).__name__, error)
