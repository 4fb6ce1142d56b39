"""`ezmia plan`: how many canaries a budget needs."""

from dataclasses import asdict
from typing import Annotated, NamedTuple

import typer

from ezmia_callbacks.cli.budget import (
    ConfidenceOption,
    FprOption,
    MaxAucOption,
    MaxTprOption,
    Rule,
    RuleOption,
    ScoreOption,
    budget_of,
    check_score,
)
from ezmia_callbacks.cli.options import in_options
from ezmia_callbacks.cli.terminal import JsonOption, say, say_json, say_table
from ezmia_callbacks.errors import ConfigurationError, TooFewCanariesError
from ezmia_callbacks.functional.budget import LeakageBudget, alpha_for_audit, check_resolvable
from ezmia_callbacks.functional.judged import STRONGEST, judged_scores
from ezmia_callbacks.functional.planning import CanaryPlan, canaries_needed, decision_power
from ezmia_callbacks.functional.sizes import AuditReach, audit_reach, rows_for, sizes_for, way_out

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
    score: ScoreOption = STRONGEST,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            min=1,
            help="Records of the training set, or people, if whole people will be held out: how many can be "
            "held out, and what an audit finds out with them. Needs no budget.",
        ),
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Say how many canaries a leakage budget needs, or a training set has room for, before it is split.

    Examples: ezmia plan --rows 1500; ezmia plan --max-auc 0.6 --audits 10 --expected 0.7
    """
    budget = budget_of(max_auc=max_auc, max_tpr=max_tpr, fpr=fpr, rule=rule, confidence=confidence)
    check_score(score)
    room = None if rows is None else _room(rows, audits=audits, confidence=confidence, score=score)
    if budget is None:
        _show_room_alone(room, is_json=is_json)
        return
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
            | ({} if room is None else {"rows": room.to_dict() | {"is_enough": room.is_enough_for(wanted)}})
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
    if room is not None:
        say()
        say(room.describe())
        say(room.compare(wanted))


class _Room(NamedTuple):
    """What a training set has room for."""

    n_rows: int
    reach: AuditReach

    def to_dict(self) -> dict[str, object]:
        return {"n_rows": self.n_rows, **self.reach.to_dict()}

    def describe(self) -> str:
        n_out = self.reach.n_non_members
        advice = ""
        if not self.reach.is_useful:
            advice = f" That is little. {in_options(way_out(self.n_rows, self.n_rows))}"
        return (
            f"{self.n_rows} rows: {self.reach.n_members} members, which stay in training, and {n_out} "
            f"non-members, which leave it ({100 * n_out / self.n_rows:.2g} % of the rows). "
            f"{self.reach.describe()}{advice}"
        )

    def is_enough_for(self, wanted: CanaryPlan) -> bool:
        """Whether the budget is resolved, and decided where that was asked for."""
        budget = wanted.budget
        n_members, n_non_members = self.reach.n_members, self.reach.n_non_members
        share = alpha_for_audit(
            wanted.n_audits, n_planned=wanted.n_audits, failure_probability=1.0 - budget.confidence
        )
        try:
            check_resolvable(
                budget,
                n_members=n_members,
                n_non_members=n_non_members,
                failure_probability=share,
                n_scores=wanted.n_scores,
            )
        except TooFewCanariesError:
            return False
        if wanted.expected is None:
            return True
        reached = decision_power(
            budget,
            expected=wanted.expected,
            n_members=n_members,
            n_non_members=n_non_members,
            failure_probability=share,
            n_scores=wanted.n_scores,
        )
        return reached >= wanted.power

    def compare(self, wanted: CanaryPlan) -> str:
        """Whether they are enough for a plan, and what to do if they are not."""
        if self.is_enough_for(wanted):
            return "They are enough for this budget: ezmia split takes such sizes by itself."
        n_all = wanted.n_members + wanted.n_non_members
        n_rows = rows_for(wanted.n_members, wanted.n_non_members)
        larger = "" if n_rows is None else f" {n_rows} rows have room for them with a tenth held out."
        if n_all > self.n_rows:
            return f"They are too few for this budget, and so are all {self.n_rows} rows.{larger}"
        share = 100 * wanted.n_non_members / self.n_rows
        return (
            f"They are too few for this budget: ask ezmia split for --members {wanted.n_members} "
            f"--non-members {wanted.n_non_members}, which takes {share:.2g} % of the rows out of training."
            f"{larger}"
        )


def _room(n_rows: int, *, audits: int, confidence: float, score: str) -> _Room:
    sizes = sizes_for(n_rows)
    return _Room(n_rows, audit_reach(*sizes, n_audits=audits, confidence=confidence, score=score))


def _show_room_alone(room: _Room | None, *, is_json: bool) -> None:
    if room is None:
        raise ConfigurationError(
            "A plan needs a budget, --max-auc 0.6 or --max-tpr 0.1 --fpr 0.01, or the number of records, "
            "--rows 1500."
        )
    if is_json:
        say_json({"rows": room.to_dict()})
    else:
        say(room.describe())


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
