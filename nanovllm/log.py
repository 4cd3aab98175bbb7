"""One logger for the package. Prompts and generated text are never logged."""

from __future__ import annotations

import json
import logging
import os

logger = logging.getLogger("nanovllm")

DEGRADATIONS = {  # what can be worse than asked for, without being an error
    "cuda_graphs": "capturing failed: steps run eagerly",
    "graph_memory": "no memory for the larger CUDA graphs: larger steps run eagerly",
    "late_compile": "a kernel was compiled while a step waited",
    "compiled_step": "the compiled CPU step could not be built for the best instructions: others, or the torch path, run",
    "kv_cache_full": "running requests were preempted, and are computed again; at most one a minute",
    "checkpoint": "the journal could not be written: requests do not survive a crash any more",
}


def degraded(reason: str, message: str, *arguments: object) -> None:
    """A line in the log, and one more of `reason`, a key of `DEGRADATIONS`, for a `DegradationCounter`."""
    logger.warning(f"degraded, {reason}: {message}", *arguments, extra={"degradation": reason})


class DegradationCounter(logging.Handler):
    """Counts the lines of `degraded` that the log's level lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(DEGRADATIONS, 0)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if (reason := getattr(record, "degradation", None)) is not None:
            self.counts[reason] += 1


def show_log_unless_configured() -> None:
    """A program that has not set up logging still sees the memory plan, and what was degraded and why."""
    if not logger.hasHandlers():
        configure_logging()


FORMAT_VARIABLE = "NANOVLLM_LOG_FORMAT"  # "text" or "json"; processes that this one starts inherit it


class Fields(dict[str, object]):
    """A message that is an object: among JSON lines it is the line, in text it is written as JSON. Encoded once, in either."""

    def __str__(self) -> str:
        return json.dumps(self, separators=(",", ":"))


class JsonLines(logging.Formatter):
    """One object a line: time (seconds since 1970), level and message; or the fields of `Fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {"level": record.levelname}
        if isinstance(record.msg, Fields):
            line |= record.msg
        else:
            line |= {"time": round(record.created, 3), "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str = "INFO") -> None:
    """Send the package's log lines to standard error, in the form that NANOVLLM_LOG_FORMAT names.

    As JSON also what libraries say that nobody has given a handler, warnings included.
    """
    is_json = os.environ.get(FORMAT_VARIABLE) == "json"
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonLines() if is_json else text)
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    if is_json:
        others = logging.lastResort = logging.StreamHandler()
        others.setFormatter(JsonLines())
        others.setLevel(logging.WARNING)
        logging.captureWarnings(True)
