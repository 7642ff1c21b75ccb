"""The example for Alertmanager, as amtool sees it: who is told of each alert, and what its inhibitions name."""

from __future__ import annotations

import re
import subprocess

import promql
import pytest
from test_alerts import ALERT_RULES, labels_of
from world import ALERTS, ROUTES

CONFIG = ALERTS / "alertmanager.yaml"
RECEIVERS = {"critical": "page", "warning": "ticket", "info": "chat"}
ALERT_LABELS = {"alertname", "severity"}


def amtool(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(["amtool", *map(str, words)], capture_output=True, text=True, timeout=60)


def route(**labels: str) -> str:
    asked = [f"{name}={value}" for name, value in labels.items()]
    done = amtool("config", "routes", "test", f"--config.file={CONFIG}", *asked)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_amtool_is_content():
    done = amtool("check-config", CONFIG)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERT_RULES)
def test_an_alert_goes_to_whom_its_severity_says(alert: str):
    severity = ALERT_RULES[alert]["labels"]["severity"]
    assert route(alertname=alert, severity=severity, namespace="a", pod="p", instance="i") == RECEIVERS[severity]


def test_what_says_nothing_of_its_severity_is_a_ticket():
    assert route(alertname="Watchdog") == "ticket"


def labels_told(alert: str) -> set[str]:
    """What the alert's series have."""
    found = promql.names(ALERT_RULES[alert]["expr"])
    by = {label for what, labels, _ in found.lists if what == "by" for label in labels}
    recorded = [one.metric for one in found.selectors if ":" in one.metric]
    return ALERT_LABELS | by | {label for metric in recorded for label in labels_of(metric)}


def alerts_of(matchers: list[str]) -> list[str]:
    for matcher in matchers:
        if found := re.fullmatch(r'alertname=~?"(.*)"', matcher):
            return [alert for alert in ALERT_RULES if re.fullmatch(found[1], alert)]
    raise AssertionError(f"{matchers} do not say which alert")


@pytest.mark.parametrize("rule", ROUTES["inhibit_rules"], ids=lambda rule: rule["source_matchers"][0])
def test_an_inhibition_is_of_alerts_that_can_meet(rule: dict):
    sources, targets = alerts_of(rule["source_matchers"]), alerts_of(rule["target_matchers"])
    assert sources and targets and not set(sources) & set(targets)
    # Each word of an alternative is an alert.
    for matcher in [*rule["source_matchers"], *rule["target_matchers"]]:
        label, _, pattern = re.fullmatch(r'(\w+)(=~?)"(.*)"', matcher).groups()
        every = [alert for alert in ALERT_RULES if re.fullmatch(pattern, alert)] if label == "alertname" else []
        expanded = len(re.findall(r"\|", pattern)) + 1
        assert label != "alertname" or len(every) == expanded, f"{matcher} names what is not there"
    for alert in [*sources, *targets]:
        assert set(rule["equal"]) <= labels_told(alert), f"{alert} has not all of {rule['equal']}"
        for matcher in rule["target_matchers"] if alert in targets else []:
            assert re.match(r"\w+", matcher)[0] in labels_told(alert)
    # A page is held back by a page alone.
    loud = {alert for alert in targets if ALERT_RULES[alert]["labels"]["severity"] == "critical"}
    assert not loud or all(ALERT_RULES[alert]["labels"]["severity"] == "critical" for alert in sources), loud
