"""One logger for the package. Prompts and generated text are never logged."""

from __future__ import annotations

import logging

logger = logging.getLogger("nanovllm")


def show_log_unless_configured() -> None:
    """A program that has not set up logging still sees the memory plan, and what was degraded and why."""
    if not logger.hasHandlers():
        configure_logging()


def configure_logging(level: str = "INFO") -> None:
    """Send the package's log lines to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
