"""What a report says in every format alike: how to read its terms, and what none of it proves."""

__all__: list[str] = []

READING = (
    (
        "Member, non-member",
        "Members are records that the model was trained on; non-members are similar records that were held "
        "out of training.",
    ),
    (
        "AUC",
        "The share of pairs of one member and one non-member in which the member has the higher score. "
        "50 % is chance; at 100 % the attack separates the two without error.",
    ),
    (
        "TPR at a given FPR",
        "The share of members that the attack identifies while it wrongly flags at most that share of the "
        "non-members: what an attacker gets right with a few confident accusations.",
    ),
    (
        "Membership advantage",
        "The largest difference between the share of members flagged and the share of non-members flagged. "
        "0 is chance.",
    ),
    (
        "Interval and band",
        "An interval holds for its own audit alone; a band holds for all audits of the run together, so that "
        "frequent audits do not make chance look like leakage. Decisions use the band.",
    ),
    (
        "Epsilon",
        "Available only where coin flips decided who is a member: a lower bound on the epsilon of "
        "differential privacy that this training could claim, next to the largest value that the same "
        "canaries could have shown. Evidence of leakage, never a certificate against it.",
    ),
    (
        "Gap",
        "An audit that failed, or a figure that the canaries cannot resolve. Leakage there is unknown, not "
        "absent.",
    ),
    (
        "Held-out loss",
        "The mean loss over the non-members' tokens, in nats per token. Leakage can rise while this loss is "
        "still falling.",
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
