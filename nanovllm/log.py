"""One logger for the package. Prompts and generated text are never logged."""

from __future__ import annotations

import logging

logger = logging.getLogger("nanovllm")


def configure_logging(level: str = "INFO") -> None:
    """Send the package's log lines to standard error. Called by the CLI; a library user configures logging itself."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
