"""Audit histories as pictures and as text for a model card; matplotlib loads when a plot is drawn."""

from ezmia_callbacks.report.markdown import summarize
from ezmia_callbacks.report.plots import plot_leakage_and_loss, plot_leakage_curve

__all__ = ["plot_leakage_and_loss", "plot_leakage_curve", "summarize"]
