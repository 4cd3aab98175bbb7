"""A real Prometheus server that scrapes one of ours once a second, with the rules and queries of deploy/observability."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parent.parent / "deploy" / "observability"
NAME = re.compile(r"\b(?:vllm|nanovllm):[a-zA-Z_:0-9]+")
PROMETHEUS = shutil.which("prometheus")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"]
    return group["rules"]


def dashboard_queries() -> list[str]:
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@contextmanager
def prometheus(port: int, folder: Path, make_load: Callable[[], None]) -> Iterator[str]:
    """The address of one that has scraped three times while there was load."""
    assert PROMETHEUS is not None
    folder.mkdir()
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "rules.yml", folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [PROMETHEUS, "--config.file", str(folder / "prometheus.yml"), "--storage.tsdb.path", str(folder / "data")]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, "--web.listen-address", address], stderr=log, stdout=log)
    try:
        end = time.monotonic() + 60
        while not samples(address, "count_over_time(vllm:num_requests_running[1m]) >= 4"):
            assert time.monotonic() < end and process.poll() is None, (folder / "log").read_text()[-2000:]
            make_load()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def samples(address: str, query: str) -> list[Any]:
    """The values of an instant query; none while the server starts. AssertionError when it does not understand it."""
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": query})) as reply:
            return [one["value"][1] for one in json.load(reply)["data"]["result"]]
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 503:
                return []
            raise AssertionError(f"{query}: {error.read().decode()}") from None
    except OSError:
        return []


def loaded_rules(address: str) -> list[dict[str, Any]]:
    """As the server has them, when each has been evaluated."""
    end = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"http://{address}/api/v1/rules") as reply:
            groups = json.load(reply)["data"]["groups"]
        loaded = [rule for group in groups for rule in group["rules"]]
        if all(rule["health"] != "unknown" for rule in loaded) or time.monotonic() > end:
            return loaded
        time.sleep(0.2)
