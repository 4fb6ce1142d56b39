"""Audit histories as a page, a JSON document, pictures, and text for a model card.

matplotlib loads when a plot is drawn, Jinja when a page is written.
"""

from ezmia_callbacks.report.document import to_document, write_json
from ezmia_callbacks.report.html import render_report, write_report
from ezmia_callbacks.report.markdown import summarize
from ezmia_callbacks.report.plots import (
    plot_leakage_and_loss,
    plot_leakage_and_utility,
    plot_leakage_curve,
)
from ezmia_callbacks.report.roc_plots import plot_roc, plot_score_histograms
from ezmia_callbacks.report.token_view import plot_tokens
from ezmia_callbacks.report.view import Subject

__all__ = [
    "Subject",
    "plot_leakage_and_loss",
    "plot_leakage_and_utility",
    "plot_leakage_curve",
    "plot_roc",
    "plot_score_histograms",
    "plot_tokens",
    "render_report",
    "summarize",
    "to_document",
    "write_json",
    "write_report",
]
