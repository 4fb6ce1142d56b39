"""Token rows of several lengths, as the auditor scores them."""

import numpy as np
from tiny import make_rows, make_texts

from ezmia_callbacks.canaries.records import IGNORED_LABEL
from ezmia_callbacks.scoring.rows import TokenRow


def as_rows(texts, *, n_masked=0):
    rows = []
    for row in make_rows(texts):
        ids = np.array(row["input_ids"])
        labels = ids.copy()
        labels[:n_masked] = IGNORED_LABEL
        rows.append(TokenRow(ids, labels))
    return rows


def mixed_rows():
    return [row for n in (3, 12, 7, 20, 5) for row in as_rows(make_texts(4, seed=n, n_words=n))]
