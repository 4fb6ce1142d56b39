"""The options that name a leakage budget and what decides, the same in every command that takes them."""

from enum import Enum
from typing import Annotated

import typer

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.functional.judged import STRONGEST, judged_scores
from ezmia_callbacks.scoring import SCORES

__all__: list[str] = []


class Rule(str, Enum):
    """What has to cross the limit."""

    LOWER = "lower"
    UPPER = "upper"
    POINT = "point"


_PANEL = "Budget"

MaxAucOption = Annotated[
    float | None,
    typer.Option(
        "--max-auc",
        help="Largest tolerated AUC of the attack: the chance that it ranks a random member above a random "
        "non-member. 0.5 is guessing, 1 is certainty; 0.6 is a common choice.",
        rich_help_panel=_PANEL,
    ),
]
MaxTprOption = Annotated[
    float | None,
    typer.Option(
        "--max-tpr",
        help="Instead: largest tolerated share of members that the attack identifies while wrongly flagging "
        "at most --fpr of the non-members. Needs many more canaries than an AUC.",
        rich_help_panel=_PANEL,
    ),
]
FprOption = Annotated[
    float,
    typer.Option("--fpr", help="The false-positive rate for --max-tpr.", rich_help_panel=_PANEL),
]
RuleOption = Annotated[
    Rule,
    typer.Option(
        "--rule",
        help="What is compared with the limit. lower: the lower end of the confidence band (over budget only "
        "on evidence). upper: its upper end (within budget only on evidence). point: the bare estimate.",
        rich_help_panel=_PANEL,
    ),
]
ConfidenceOption = Annotated[
    float,
    typer.Option(
        "--confidence",
        help="Joint confidence of all bands, above 0 and below 1.",
        rich_help_panel=_PANEL,
    ),
]
_TOGETHER = ", ".join(judged_scores(STRONGEST))
ScoreOption = Annotated[
    str,
    typer.Option(
        "--score",
        help=f"What decides: {STRONGEST} ({_TOGETHER} together, and margin for preference pairs), or one "
        f"score: {', '.join(SCORES)}.",
    ),
]


def check_score(score: str) -> None:
    """Raise unless there is such a score.

    Raises:
        ConfigurationError: naming all that there are.
    """
    if score != STRONGEST and score not in SCORES:
        raise ConfigurationError(
            f"Unknown --score {score!r}: use {STRONGEST}, or one of {', '.join(SCORES)}."
        )


def budget_of(
    *, max_auc: float | None, max_tpr: float | None, fpr: float, rule: Rule, confidence: float
) -> LeakageBudget | None:
    """The budget that the options name, if they name one.

    Raises:
        ConfigurationError: if they name two, or one out of range.
    """
    if max_auc is not None and max_tpr is not None:
        raise ConfigurationError("--max-auc and --max-tpr were both given: choose one.")
    limit = max_auc if max_tpr is None else max_tpr
    if limit is None:
        return None
    option, chance = ("--max-auc", 0.5) if max_tpr is None else ("--max-tpr", fpr)
    if 0.0 < fpr < 1.0 and not chance < limit < 1.0:
        raise ConfigurationError(
            f"{option} must lie strictly between {chance:g} (chance) and 1, got {limit:g}."
        )
    return LeakageBudget(
        limit=limit,
        metric="auc" if max_tpr is None else "tpr_at_fpr",
        fpr=fpr,
        rule=rule.value,
        confidence=confidence,
    )
