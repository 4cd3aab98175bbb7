"""The dashboard in deploy/observability as a file; test_live.py asks its queries of a real Prometheus server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from prometheus_server import DEPLOY, rules

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_dashboard_is_current():
    command = [sys.executable, str(ROOT / "scripts/dashboard.py"), "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_the_dashboard_is_well_formed():
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in board["panels"]}) >= 15
    assert all(panel["title"] and panel["targets"] and panel["gridPos"]["x"] < 24 for panel in board["panels"])


def test_every_alert_says_what_to_look_at():
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 5
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] in ("warning", "critical") for rule in alerts)
