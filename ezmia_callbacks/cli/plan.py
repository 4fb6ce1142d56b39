"""`ezmia plan`: how many canaries a budget needs."""

from dataclasses import asdict
from typing import Annotated

import typer

from ezmia_callbacks.cli.budget import (
    ConfidenceOption,
    FprOption,
    MaxAucOption,
    MaxTprOption,
    Rule,
    RuleOption,
    budget_of,
)
from ezmia_callbacks.cli.terminal import JsonOption, say, say_json, say_table
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.budget import LeakageBudget
from ezmia_callbacks.functional.judged import STRONGEST, judged_scores
from ezmia_callbacks.functional.planning import CanaryPlan, canaries_needed

__all__: list[str] = []

_POWERS = (0.5, 0.8, 0.95)


def plan(
    max_auc: MaxAucOption = None,
    max_tpr: MaxTprOption = None,
    fpr: FprOption = 0.01,
    rule: RuleOption = Rule.LOWER,
    confidence: ConfidenceOption = 0.95,
    audits: Annotated[
        int, typer.Option("--audits", help="Audits of the run, not counting the one before training.")
    ] = 1,
    expected: Annotated[
        float | None,
        typer.Option(
            "--expected",
            help="True leakage that an audit should detect, such as 0.7 under --max-auc 0.6; without it, "
            "only the fewest canaries for which the budget means anything.",
        ),
    ] = None,
    power: Annotated[float, typer.Option("--power", help="Probability of detecting it.")] = 0.8,
    ratio: Annotated[float, typer.Option("--ratio", help="Non-members for each member.")] = 1.0,
    score: Annotated[
        str,
        typer.Option("--score", help="What will decide: strongest (several scores together), or one score."),
    ] = STRONGEST,
    is_json: JsonOption = False,
) -> None:
    """Say how many canaries a leakage budget needs, before the data is split.

    Example: ezmia plan --max-auc 0.6 --audits 10 --expected 0.7
    """
    budget = budget_of(max_auc=max_auc, max_tpr=max_tpr, fpr=fpr, rule=rule, confidence=confidence)
    if budget is None:
        raise ConfigurationError("A plan needs a budget: give --max-auc 0.6, or --max-tpr 0.1 --fpr 0.01.")
    n_scores = len(judged_scores(score))
    wanted = canaries_needed(
        budget,
        n_audits=audits,
        expected=expected,
        power=power,
        non_members_per_member=ratio,
        n_scores=n_scores,
    )
    alternatives = _alternatives(budget, wanted, ratio=ratio, n_scores=n_scores)
    if is_json:
        say_json(
            {
                **asdict(wanted),
                "text": wanted.describe(),
                "alternatives": [
                    {
                        "expected": value,
                        "power": chance,
                        "n_members": None if plan is None else plan.n_members,
                        "n_non_members": None if plan is None else plan.n_non_members,
                    }
                    for value, row in zip(_values(budget, expected), alternatives, strict=True)
                    for chance, plan in zip(_POWERS, row, strict=True)
                ],
            }
        )
        return
    say(wanted.describe())
    say()
    say_table(
        (f"true {budget.label}", *(f"{100 * chance:g} % chance" for chance in _POWERS)),
        [
            (f"{value:.3g}", *(_counts(plan) for plan in row))
            for value, row in zip(_values(budget, expected), alternatives, strict=True)
        ],
    )
    outcome = "within" if rule is Rule.UPPER else "over"
    say()
    say(
        f"Members + non-members needed for one audit of {audits} to detect a run {outcome} budget, by its "
        f"true {budget.label} and the chance of detecting it."
    )


def _values(budget: LeakageBudget, expected: float | None) -> list[float]:
    """True leakages between the limit and where the budget is easy, the expected one among them."""
    end = budget.chance if budget.rule == "upper" else 1.0
    values = {budget.limit + share * (end - budget.limit) for share in (0.125, 0.25, 0.5)}
    if expected is not None:
        values.add(expected)
    return sorted(values, key=lambda value: abs(value - budget.limit))


def _alternatives(
    budget: LeakageBudget, wanted: CanaryPlan, *, ratio: float, n_scores: int
) -> list[list[CanaryPlan | None]]:
    return [
        [
            _plan_or_none(
                budget, wanted.n_audits, expected=value, power=power, ratio=ratio, n_scores=n_scores
            )
            for power in _POWERS
        ]
        for value in _values(budget, wanted.expected)
    ]


def _plan_or_none(
    budget: LeakageBudget, n_audits: int, *, expected: float, power: float, ratio: float, n_scores: int
) -> CanaryPlan | None:
    """None where no number of canaries would do."""
    try:
        return canaries_needed(
            budget,
            n_audits=n_audits,
            expected=expected,
            power=power,
            non_members_per_member=ratio,
            n_scores=n_scores,
        )
    except TooFewCanariesError:
        return None


def _counts(plan: CanaryPlan | None) -> str:
    return "out of reach" if plan is None else f"{plan.n_members} + {plan.n_non_members}"
