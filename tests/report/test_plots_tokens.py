import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.report.token_view import plot_tokens
from ezmia_callbacks.scoring.statistics import TokenStatistics

TOKENS = ["Paris", "is", "$x$", "\n", "end"]
REFERENCE = [-3.0, -1.0, -2.0, -2.0, -4.0]
TARGET = [-1.0, -0.5, -3.0, -1.5, -3.9]
IS_CORRECT = [False, True, False, False, False]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def statistics(log_probs, *, is_correct=IS_CORRECT, n_before=0):
    """One record, after another one of `n_before` tokens."""
    values = np.array([-9.0] * n_before + list(log_probs), dtype=np.float32)
    correct = np.array([True] * n_before + list(is_correct))
    ends = [0, n_before, len(values)] if n_before else [0, len(values)]
    return TokenStatistics(values, correct, values, np.ones_like(values), np.array(ends))


def drawn(ax):
    return {text.get_text(): text for text in ax.texts[:-1]}


def test_error_tokens_carry_their_shift_and_color_and_the_others_neither():
    ax = plot_tokens(TOKENS, statistics(TARGET), statistics(REFERENCE))

    words = drawn(ax)
    assert list(words) == ["Paris", "+2.0", "is", "$x$", "-1.0", "↵", "+0.5", "end", "+0.1"]
    assert words["is"].get_bbox_patch() is None
    red, _, blue = to_rgb(words["Paris"].get_bbox_patch().get_facecolor())
    assert red > blue
    red, _, blue = to_rgb(words["$x$"].get_bbox_patch().get_facecolor())
    assert blue > red


def test_a_larger_shift_has_a_stronger_color():
    words = drawn(plot_tokens(TOKENS, statistics(TARGET), statistics(REFERENCE)))

    strong, weak = (sum(to_rgb(words[name].get_bbox_patch().get_facecolor())) for name in ("Paris", "end"))
    assert strong < weak - 0.5


def test_text_is_no_formula():
    assert not drawn(plot_tokens(TOKENS, statistics(TARGET), statistics(REFERENCE)))["$x$"].get_parse_math()


def test_caption_sums_the_error_zone():
    ax = plot_tokens(TOKENS, statistics(TARGET), statistics(REFERENCE))

    assert " ".join(ax.texts[-1].get_text().split()) == (
        "EZ score 0.722. Boxed: the 4 tokens predicted wrongly, with their shift in nats; 3 moved up by 2.6 "
        "in all, 1 down by 1.0."
    )


def test_the_record_asked_for_is_drawn():
    target, reference = statistics(TARGET, n_before=3), statistics(REFERENCE, n_before=3)

    assert "+2.0" in drawn(plot_tokens(TOKENS, target, reference, record=1))


def test_long_records_break_into_lines_inside_the_axes():
    tokens = ["word"] * 60
    values = np.full(60, -1.0)

    ax = plot_tokens(
        tokens,
        statistics(values, is_correct=[False] * 60),
        statistics(values - 1, is_correct=[False] * 60),
    )

    figure = ax.get_figure()
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len({round(box.y0) for box in boxes}) > 5
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_record_without_errors_is_drawn_without_boxes():
    target = statistics(TARGET, is_correct=[True] * 5)

    assert list(drawn(plot_tokens(TOKENS, target, statistics(REFERENCE)))) == [
        "Paris",
        "is",
        "$x$",
        "↵",
        "end",
    ]


@pytest.mark.parametrize(
    ("tokens", "record", "message"),
    [
        (TOKENS[:-1], 0, "5 scored tokens, got 4 tokens"),
        ("Paris", 0, "got one string"),
        (TOKENS, 1, r"`record` must lie in 0 \.\. 0, got 1"),
        (TOKENS, -1, "`record`"),
        (TOKENS, True, "`record`"),
    ],
)
def test_what_does_not_fit_is_refused(tokens, record, message):
    with pytest.raises(ConfigurationError, match=message):
        plot_tokens(tokens, statistics(TARGET), statistics(REFERENCE), record=record)


def test_statistics_of_other_records_are_refused():
    with pytest.raises(ConfigurationError, match="other records"):
        plot_tokens(TOKENS, statistics(TARGET), statistics(REFERENCE, n_before=2))


def test_given_axes_are_drawn_on_and_nothing_global_changes():
    _, given = pyplot.subplots()
    figures, style = pyplot.get_fignums(), dict(matplotlib.rcParams)

    ax = plot_tokens(TOKENS, statistics(TARGET), statistics(REFERENCE), ax=given)

    assert ax is given
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == style
