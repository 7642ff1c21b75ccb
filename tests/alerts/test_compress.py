"""The compressed rules are the shipped ones in all but their durations, and what compress.py names."""

from __future__ import annotations

import copy

import compress
import promql
import pytest
from world import ROUTES, SHIPPED

COMPRESSED = compress.rules(SHIPPED)
PAIRS = [(one, other) for group, short in zip(SHIPPED["groups"], COMPRESSED["groups"], strict=True) for one, other in zip(group["rules"], short["rules"], strict=True)]


def durations(words: list[str]) -> list[tuple[str, str]]:
    """Each with what is before it."""
    return [(before, word) for before, word in zip(words, words[1:]) if compress.DURATION.fullmatch(word)]


def words(rule: dict) -> list[str]:
    return [text for _, text in promql.tokens(rule["expr"])]


def without_durations(rule: dict) -> dict:
    out = copy.deepcopy(rule) | {"expr": ["…" if compress.DURATION.fullmatch(word) else word for word in words(rule)]}
    return out | ({"for": "…"} if "for" in out else {})


@pytest.mark.parametrize(("shipped", "short"), PAIRS, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_differs_in_its_durations_alone(shipped: dict, short: dict):
    one, other = without_durations(shipped), without_durations(short)
    if adapted := compress.ADAPTED.get(shipped.get("alert")):
        number = lambda text: [word for _, word in promql.tokens(text)]  # noqa: E731
        before, after = map(number, adapted)
        at = next(place for place in range(len(one["expr"])) if one["expr"][place : place + len(before)] == before)
        one["expr"][at : at + len(before)] = after
    assert one == other


@pytest.mark.parametrize(("shipped", "short"), PAIRS, ids=lambda rule: rule.get("alert") or rule["record"])
def test_each_is_a_sixtieth(shipped: dict, short: dict):
    pairs = list(zip(durations(words(shipped)), durations(words(short)), strict=True))
    if "for" in shipped:
        pairs.append((("for", shipped["for"]), ("for", short["for"])))
    for (before, long), (_, brief) in pairs:
        if before == "for" and shipped["alert"] in compress.LOOKS:
            assert brief == compress.LOOKS[shipped["alert"]] and compress.milliseconds(brief) > 10_000
        elif before == "offset" and long in compress.OFFSETS:
            assert brief == compress.OFFSETS[long]
        else:
            assert compress.milliseconds(long) == compress.FACTOR * compress.milliseconds(brief), f"{long} became {brief}"


def test_there_are_durations():
    """Nothing above holds for want of any."""
    assert sum(len(durations(words(rule))) for rule, _ in PAIRS) > 60
    said = {long for rule, _ in PAIRS for before, long in durations(words(rule)) if before == "offset"}
    assert set(compress.OFFSETS) <= said
    assert set(compress.ADAPTED) | set(compress.LOOKS) <= {rule.get("alert") for rule, _ in PAIRS}


def test_the_routes_differ_in_their_waits_and_addresses_alone():
    short = compress.routes(ROUTES, {"page": "http://a", "ticket": "http://b", "chat": "http://c"})
    waits = {"group_wait", "group_interval", "repeat_interval"}
    for one, other in zip(compress.walk(ROUTES["route"]), compress.walk(short["route"]), strict=True):
        strip = lambda route: {key: value for key, value in route.items() if key not in waits | {"routes"}}  # noqa: E731
        assert strip(one) == strip(other)
        for wait in waits & set(one):
            assert compress.milliseconds(other[wait]) == compress.milliseconds(one[wait]) // compress.FACTOR > 0
    assert short["inhibit_rules"] == ROUTES["inhibit_rules"]
    assert [one["name"] for one in short["receivers"]] == [one["name"] for one in ROUTES["receivers"]]
