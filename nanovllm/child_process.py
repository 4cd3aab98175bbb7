"""How one of our processes starts another: a Python that sees our `sys.path`, and nothing besides.

`python -m` would also look for modules in the current folder, and a server may be started inside a downloaded checkpoint.
Knows nothing of what the processes say to each other.
"""

from __future__ import annotations

import sys

_BOOT = """import sys
module, number = sys.argv[1], int(sys.argv[2])
arguments, sys.path[:] = sys.argv[3 : 3 + number], sys.argv[3 + number :]
from importlib import import_module
sys.exit(import_module(module).main(*arguments))"""


def child_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module.main(*arguments)`; what it returns is the exit status."""
    return [sys.executable, "-c", _BOOT, module, str(len(arguments)), *arguments, *filter(None, sys.path)]
