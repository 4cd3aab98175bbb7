"""The instruction sets that tests of the compiled step run: those of this machine, and one with tiles in any case.

Where the processor has no AMX its tiles are emulated over the portable registers (emulated_tiles.h).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from nanovllm.kernels.cpu import build

AVAILABLE = build.available_instruction_sets()
TILES = Path(__file__).with_name("emulated_tiles.h")
EMULATED = "emulated-amx"
HAS_TILES = "amx" in AVAILABLE
if not HAS_TILES:
    version = hashlib.sha256(TILES.read_bytes()).hexdigest()[:8]  # or a library of older tiles would be taken from the cache
    build.INSTRUCTION_SETS[EMULATED] = (set(), ("-include", str(TILES), f"-DTILES={version}"))

HERE = AVAILABLE if HAS_TILES else [*AVAILABLE[:-1], EMULATED, AVAILABLE[-1]]  # best first, the portable one last
WITH_TILES = "amx" if HAS_TILES else EMULATED
WITHOUT_TILES = "avx512-bf16" if HAS_TILES else "portable"  # the same registers
