"""What a report says in every format alike: how to read its terms, and what none of it proves."""

__all__: list[str] = []

READING = (
    (
        "Member, non-member, canary",
        "member",
        "Members are records that the model was trained on; non-members are similar records that were held "
        "out of training. Both are canaries: records of which it is known.",
    ),
    (
        "Attack, score",
        "score",
        "An attacker gives every record a score, higher where it looks more like one that was trained on, "
        "and takes the highest for members. EZ-MIA looks at the tokens that the model predicts wrongly, and "
        "how far training moved them (arXiv 2601.12104).",
    ),
    (
        "AUC",
        "auc",
        "How often an attacker who is shown one member and one non-member picks the member, as a share. 0.5 "
        "is guessing; at 1 the two can be told apart without error.",
    ),
    (
        "TPR at a given FPR",
        "tpr",
        "The share of members that the attack identifies while it wrongly flags at most that share of the "
        "non-members: what an attacker gets right with a few confident accusations.",
    ),
    (
        "Membership advantage",
        "advantage",
        "The largest difference between the share of members flagged and the share of non-members flagged. "
        "0 is guessing.",
    ),
    (
        "Interval, band",
        "band",
        "The range in which the true figure lies with the stated confidence. An interval holds for its own "
        "audit alone; a band holds for all audits of the run together, so that frequent audits do not make "
        "chance look like leakage. Decisions use the band.",
    ),
    (
        "Leakage budget, limit",
        "budget",
        "How much leakage the run was allowed. Within budget: by its rule the limit is not exceeded. Over "
        "budget: it is. Not judged: an audit that failed, or a figure that the canaries cannot resolve; "
        "leakage there is unknown, not absent, and that is never within budget.",
    ),
    (
        "Baseline",
        "baseline",
        "The audit before the first step. A score that compares with the starting weights reads 0.5 there by "
        "construction.",
    ),
    (
        "Epsilon",
        "epsilon",
        "Available only where coin flips decided who is a member: a lower bound on the epsilon of "
        "differential privacy that this training could claim, next to the largest value that the same "
        "canaries could have shown. Evidence of leakage, never a certificate against it.",
    ),
    (
        "Held-out loss",
        "held-out-loss",
        "The mean loss over the non-members' tokens, in nats per token: how well the model does on records "
        "that it was not trained on. Leakage can rise while this loss is still falling.",
    ),
)

LIMITS = (
    "Within budget means that this attack found no excess leakage on these canaries. It does not mean that "
    "the model is private.",
    "A stronger attack may find more than this one. The figures bound leakage from below, never from above.",
    "The figures apply to records like the canaries. Records that are rare, repeated or different may be "
    "memorized more strongly.",
    "The intervals account for the choice of the canaries, not for the randomness of training: another seed "
    "gives another model.",
    "A headline applies to the weights at its audit, and to no other checkpoint, merge or quantization.",
    "Nothing here is a differential-privacy guarantee.",
)
