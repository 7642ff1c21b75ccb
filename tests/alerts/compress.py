"""The shipped rules with their time compressed, so that hours pass in minutes: all of what differs is said here, and tested.

An hour takes a minute. Yesterday and last week are a minute ago, three hours ago is a minute and a half: nobody waits for a week.
"""

from __future__ import annotations

import copy
import re

import promql

FACTOR = 60
# How far back an offset looks, where a sixtieth would still be too far.
OFFSETS = {"3h": "90s", "1d": "60s", "1w": "60s"}
# A number that is an hour in seconds.
ADAPTED = {"ClaudeAgentSpendRunaway": ("* 3600 > 30", f"* {3600 // FACTOR} > 30")}
# The sidecar looks at processes every five seconds and for bare CLIs every ten, compressed or not: what it saw once must not fire.
LOOKS = {"ClaudeAgentStuck": "12s", "AgentSidecarUnwrapped": "25s"}
DURATION = re.compile(r"\d+(ms|[smhdwy])(\d+(ms|[smhdwy]))*")
UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000, "y": 31_536_000_000}


def milliseconds(duration: str) -> int:
    return sum(int(n) * UNITS[unit] for n, unit in re.findall(r"(\d+)(ms|[smhdwy])", duration))


def shorter(duration: str) -> str:
    return f"{milliseconds(duration) // FACTOR}ms"


def expression(text: str, alert: str = "") -> str:
    if alert in ADAPTED:
        before, after = ADAPTED[alert]
        assert before in text, f"{alert} does not say {before!r} any more"
        text = text.replace(before, after)
    words = [word.group() for word in promql.TOKEN.finditer(text)]
    # Blanks are words, too: the one before them says what a duration is for.
    said = [place for place, word in enumerate(words) if word.strip()]
    for before, place in zip(said, said[1:]):
        if DURATION.fullmatch(words[place]):
            far = OFFSETS.get(words[place]) if words[before] == "offset" else None
            words[place] = far or shorter(words[place])
    return "".join(words)


def rules(shipped: dict) -> dict:
    out = copy.deepcopy(shipped)
    for group in out["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expression(rule["expr"], rule.get("alert", ""))
            if "for" in rule:
                rule["for"] = LOOKS.get(rule["alert"]) or shorter(rule["for"])
    return out


def routes(shipped: dict, receivers: dict[str, str]) -> dict:
    """The example of Alertmanager's, with its waits compressed and each receiver at an address."""
    out = copy.deepcopy(shipped)
    for route in walk(out["route"]):
        for wait in ["group_wait", "group_interval", "repeat_interval"]:
            if wait in route:
                route[wait] = shorter(route[wait])
    return deliver(out, receivers)


def deliver(config: dict, receivers: dict[str, str]) -> dict:
    """Each receiver at an address of ours."""
    out = copy.deepcopy(config)
    names = [one["name"] for one in out["receivers"]]
    out["receivers"] = [{"name": name, "webhook_configs": [{"url": receivers[name]}]} if name in receivers else {"name": name} for name in names]
    return out


def walk(route: dict):
    yield route
    for one in route.get("routes", []):
        yield from walk(one)
