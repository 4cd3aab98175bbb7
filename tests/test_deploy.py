"""The files in deploy/: linted where a linter can be had, rendered, and held to what the server really does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nanovllm.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/nanovllm"
HELM = shutil.which("helm") or shutil.which("helm", path=str(Path(sys.executable).parent))
needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed: python scripts/fetch_helm.py .venv/bin")

FULL = {
    "model": "Qwen/Qwen3-0.6B",
    "options": ["--max-model-len", "8192"],
    "gpus": 1,
    "keys": {"api": "one-long-key,another-one", "admin": "root-of-all", "metrics": "for-metrics"},
    "cache": {"existingClaim": "models"},
    "autoscaling": {"enabled": True},
    "podMonitor": {"enabled": True},
    "podDisruptionBudget": {"enabled": True},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "podAnnotations": {"a": "b"},
    "imagePullSecrets": [{"name": "registry"}],
    "drainSeconds": 120,
}
KEDA = {
    "keys": {"existingSecret": "mine"},
    "autoscaling": {"enabled": True, "kind": "keda", "prometheusUrl": "http://prometheus:9090"},
}
SMALL = {"keys": {"insecure": True}}


# --- the chart


def helm(command: str, values: dict, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "values.json"
    path.write_text(json.dumps(values))
    name = ["chat"] if command == "template" else []
    return subprocess.run([HELM, command, *name, str(CHART), "-f", str(path), *arguments], capture_output=True, text=True)


def render(values: dict, tmp_path: Path) -> dict[str, dict]:
    result = helm("template", values, tmp_path)
    assert result.returncode == 0, result.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(result.stdout) if document}


@needs_helm
@pytest.mark.parametrize("values", [FULL, KEDA, SMALL], ids=["full", "keda", "small"])
def test_the_chart_passes_the_linter_and_the_schemas_of_kubernetes(values, tmp_path):
    result = helm("lint", values, tmp_path, "--strict")
    assert result.returncode == 0, result.stdout + result.stderr
    validate = pytest.importorskip("kubernetes_validate")
    documents = render(values, tmp_path)
    for kind, document in documents.items():
        if kind not in ("ScaledObject", "PodMonitor"):  # of operators, whose schemas are not part of Kubernetes
            validate.validate(document, "1.31", strict=True)
    assert {"Deployment", "Service"} <= set(documents)


@needs_helm
def test_pods_run_without_rights_and_write_only_where_they_must(tmp_path):
    for values in (FULL, KEDA, SMALL):
        pod = render(values, tmp_path)["Deployment"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/cache", "/tmp"}


@needs_helm
def test_probes_ask_what_they_should_and_the_end_outlasts_the_drain(tmp_path):
    pod = render(FULL, tmp_path)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")]
    assert paths == ["/health", "/health", "/ready"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = int(container["args"][container["args"].index("--drain-timeout-s") + 1])
    assert (pause, drain) == (5, 120) and pod["terminationGracePeriodSeconds"] == pause + drain + 10
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 900


@needs_helm
def test_the_queue_scales_the_deployment(tmp_path):
    documents = render(FULL, tmp_path)
    assert "replicas" not in documents["Deployment"]["spec"]
    (metric,) = documents["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    (trigger,) = render(KEDA, tmp_path)["ScaledObject"]["spec"]["triggers"]
    assert trigger["metadata"]["query"] == 'sum(vllm:num_requests_waiting{namespace="default", pod=~"chat-nanovllm-.*"})'
    assert render(SMALL, tmp_path)["Deployment"]["spec"]["replicas"] == 1


@needs_helm
def test_keys_come_from_a_secret_and_never_from_arguments(tmp_path):
    documents = render(FULL, tmp_path)
    assert documents["Secret"]["stringData"]["NANOVLLM_API_KEYS"] == "one-long-key,another-one,for-metrics"
    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": documents["Secret"]["metadata"]["name"]}}]
    assert not set(container["args"]) & {"one-long-key", "one-long-key,another-one", "root-of-all"}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1 and container["image"] == "nanovllm:cuda"
    assert "Secret" not in render(KEDA, tmp_path)
    assert "--insecure" in render(SMALL, tmp_path)["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]


@needs_helm
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "set keys.api or keys.existingSecret"),
        ({"keys": {"api": "short"}}, "api"),
        ({"keys": {"api": "a-long-key"}, "replica": 2}, "replica"),
        ({"keys": {"api": "a-long-key"}, "gpus": "one"}, "gpus"),
        ({"keys": {"api": "a-long-key"}, "autoscaling": {"enabled": True, "kind": "keda"}}, "needs autoscaling.prometheusUrl"),
    ],
)
def test_wrong_values_are_refused(values, message, tmp_path):
    result = helm("template", values, tmp_path)
    assert result.returncode != 0 and message in result.stderr


# --- everything else


def test_yaml_files_are_well_formed():
    for path in [*DEPLOY.rglob("*.yaml")]:
        if "templates" not in path.parts:
            assert yaml.safe_load(path.read_text(encoding="utf-8")), path


def test_the_image_runs_as_nobody_and_watches_its_health():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE)
    assert [name for _, name in stages] == ["install", "base", "cpu", "cuda"]
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users[0] == users[-1] == "10001:10001"
    assert "HEALTHCHECK" in text and "/health" in text and "STOPSIGNAL SIGTERM" in text
    assert ":latest" not in text


def test_what_the_image_copies_and_installs_exists():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for sources in re.findall(r"^COPY ((?!--).*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists() and f"!{source.removeprefix('./')}" in allowed
    (extras,) = re.findall(r'install "\.\[([\w,]+)\]"', text)
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not [extra for extra in extras.split(",") if not re.search(rf"^{extra} = \[", declared, re.MULTILINE)]


def test_compose_has_a_profile_for_each_image_and_gives_no_rights():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {"cpu": ["cpu"], "cuda": ["cuda"]}
    for name, service in services.items():
        assert (
            service["build"]["target"] == name
            and (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        )
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        drain = int(re.search(r"--drain-timeout-s (\d+)", service["command"])[1])
        assert int(service["stop_grace_period"].removesuffix("s")) > drain + 5


def test_options_in_deploy_exist():
    known = {option for action in serve_parser()._actions for option in action.option_strings}
    files = [path for path in [*DEPLOY.rglob("*")] if path.is_file() and path.suffix not in (".json", ".tpl", ".txt")]
    used = set()
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.name == "Dockerfile":
            text = "\n".join(re.findall(r"^ENTRYPOINT .*$", text, re.MULTILINE))
        used |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)))
    assert {"--drain-timeout-s", "--host", "--insecure"} <= used
    assert not used - known


def serve_parser():
    (commands,) = [action for action in build_parser()._actions if hasattr(action, "choices") and action.choices]
    if "serve" not in commands.choices:
        pytest.skip("nanovllm serve is not there yet")
    return commands.choices["serve"]


def test_the_unit_gives_no_rights():
    lines = set((DEPLOY / "systemd/nanovllm.service").read_text(encoding="utf-8").splitlines())
    wanted = {"DynamicUser=yes", "CapabilityBoundingSet=", "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes"}
    assert wanted | {"PrivateTmp=yes", "UMask=0077", "RestrictSUIDSGID=yes"} <= lines


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_passes_systemds_own_check(tmp_path):
    text = (DEPLOY / "systemd/nanovllm.service").read_text(encoding="utf-8")
    unit = tmp_path / "nanovllm.service"
    unit.write_text(text.replace("/opt/nanovllm/bin/nanovllm", sys.executable))  # the program has to exist
    result = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr.strip(), result.stderr
    drain = int(re.search(r"--drain-timeout-s (\d+)", text)[1])
    assert int(re.search(r"TimeoutStopSec=(\d+)", text)[1]) > drain + 5
