"""A library with the functions of NVML that we call, and two devices. A reading costs one of them 1.5 J."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("cc") or shutil.which("gcc")
SOURCE = """
#include <string.h>
static unsigned long long used[2] = {5000, 70000};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &used[index]; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = &used[1]; return strcmp(uuid, "GPU-1") ? 2 : 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy)
    { *energy = *(unsigned long long *)device += 1500; return 0; }
const char *nvmlErrorString(int status) { return "Not Found"; }
"""


def write_nvml(folder: Path) -> Path:
    """Its path; the name is that of the real one."""
    assert COMPILER is not None
    (folder / "nvml.c").write_text(SOURCE)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(library), str(folder / "nvml.c")], check=True)
    return library
