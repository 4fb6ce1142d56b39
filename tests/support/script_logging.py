"""Logging as a script has it, without the handlers that pytest adds."""

import logging
import sys
from contextlib import contextmanager


@contextmanager
def script_logging(level=None):
    """The root logger, with a handler to standard error of this level; None configures nothing."""
    loggers = [logging.getLogger(), logging.getLogger("ezmia_callbacks")]
    before = [(logger, logger.handlers, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers = []
    if level is not None:
        loggers[0].addHandler(logging.StreamHandler(sys.stderr))
    loggers[0].setLevel(level or logging.WARNING)
    loggers[1].setLevel(logging.NOTSET)
    try:
        yield loggers[0]
    finally:
        for logger, handlers, its_level in before:
            logger.handlers = handlers
            logger.setLevel(its_level)
