"""The fleet's page at `/` in a real browser: whose sessions are shown to whom, as they change, and what becomes of the token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from harness import wait_for
from selenium.webdriver.common.keys import Keys
from test_page import Page, chromium  # noqa: F401: a fixture

sys.path.append(str(Path(__file__).resolve().parents[1] / "fleet"))

import outside  # noqa: E402


@pytest.fixture
def fleet(tmp_path):
    one = outside.Outside(tmp_path, harness.binary(), harness.free_port())
    try:
        yield one.start()
    finally:
        one.close()


@pytest.fixture
def page(chromium, fleet):  # noqa: F811
    page = Page(chromium, fleet)
    yield page
    chromium.get("about:blank")


def enter(page: Page, token: str) -> None:
    page.js("document.querySelector('#token').focus()")
    page.press(token, Keys.ENTER)


def up(page: Page) -> None:
    """One of the page's is up: before its agent tells of its work, at it, or at rest after it."""
    wait_for("one that is up", lambda: {"ready", "active", "idle"} & set(page.text("#rows").split()))


def test_a_token_shows_its_own_sessions_as_they_change(fleet, page):
    page.open()
    page.shows("#enter", "Who asks?")
    page.audit()
    enter(page, "nobody-0123456789abcdef")
    page.shows("#wrong", "nobody's token")
    assert page.js("return sessionStorage.length") == 0
    # What the browser says of a refused request is no mistake of the page's, and may come behind the page's own word.
    wait_for("the browser's word", lambda: [line for line in page.driver.get_log("browser") if "401" in line["message"]])

    page.js("window.mark = 'not reloaded'")
    enter(page, outside.TOKENS["shop"])
    page.shows("#link", "live")
    page.shows("#empty", "No session of yours")
    assert fleet.create("stays", "mine") == 201 and fleet.create("task", "another-s", "poor") == 201
    page.shows("#rows", "mine", "shop", "stays", "local")
    page.shows("#total-agents", "$0.1939")
    up(page)
    fleet.ask("/v1/sessions/mine/pause", "POST")
    page.shows("#rows", "paused")
    page.audit()
    page.shot("fleet")
    fleet.ask("/v1/sessions/mine", "DELETE")
    wait_for("it to be gone", lambda: "mine" not in page.text("#rows"), 60)
    page.js("document.querySelector('#over').click()")
    page.shows("#rows", "mine", "destroyed")
    assert "another-s" not in page.js("return document.documentElement.outerHTML")
    assert page.js("return window.mark") == "not reloaded" and page.js("return document.cookie") == ""
    # It is in no address, in no other tab, and gone when it is to be.
    assert outside.TOKENS["shop"] not in page.driver.current_url + page.js("return document.documentElement.outerHTML + JSON.stringify(localStorage)")
    page.js("document.querySelector('#leave').click()")
    assert page.js("return sessionStorage.length") == 0 and page.text("#rows") == ""
    page.clean()


def test_who_may_sees_all_and_a_fleet_that_is_away_is_said(fleet, page):
    page.open()
    enter(page, outside.TOKENS["ops"])
    page.shows("#link", "live")
    assert fleet.create("stays", "one") == 201 and fleet.create("breaks", "two") == 201 and fleet.create("task", "three", "poor") == 201
    page.shows("#rows", "one", "poor")
    page.js("document.querySelector('#over').click()")
    page.shows("#rows", "two", "failed", "exit code 1")
    page.js("document.querySelector('#filter').focus()")
    page.press("exit code")
    wait_for("one row", lambda: page.js("return document.querySelectorAll('#rows tr').length") == 1)
    page.press(*[Keys.BACKSPACE] * len("exit code"))
    fleet.process.kill()
    fleet.process.wait(30)
    page.shows("#link", "connection lost, last data of")
    fleet.start()
    page.shows("#link", "live")
    fleet.ask("/v1/sessions/one", "DELETE")
    page.shows("#rows", "one", "destroyed")
    page.clean(lost=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_and_fits_a_phone(scheme, fleet, page):
    fleet.create("stays", "one")
    fleet.create("breaks", "two")
    page.look(scheme)
    page.open()
    enter(page, outside.TOKENS["shop"])
    page.js("document.querySelector('#over').click()")
    page.shows("#rows", "one", "two", "failed")
    up(page)
    page.audit()
    page.look(scheme, 390, 844)
    page.audit()
    page.fits()
    page.shot(f"fleet-{scheme}")
    page.clean()


def test_the_command_line_follows_events_over_a_restart(fleet):
    """Beside the page: the same stream, in a terminal."""
    words = [str(outside.binary()), "events", "--url", fleet.url, "--token-file", str(fleet.directory / "shop")]
    with (fleet.directory / "events").open("wb") as out:
        following = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        every = subprocess.Popen([*words, "--json"], stdin=subprocess.DEVNULL, stdout=(fleet.directory / "json").open("wb"), stderr=subprocess.STDOUT)
    try:
        wait_for("listeners", lambda: "agent_fleet_event_listeners 2" in fleet.ask("/metrics")[1], 60)
        said = lambda: (fleet.directory / "events").read_text()  # noqa: E731
        assert fleet.create("stays", "one") == 201 and fleet.create("stays", "of-another", "poor") == 201
        wait_for("ready", lambda: any(f" one {phase}" in said() for phase in ("ready", "active", "idle")), 60)
        fleet.process.terminate()
        # It does not wait for who listens.
        assert fleet.process.wait(60) == 0
        fleet.start()
        fleet.ask("/v1/sessions/one", "DELETE")
        wait_for("the end", lambda: " one destroyed" in said(), 60)
        assert "of-another" not in said()
        told = lambda: list(map(json.loads, harness.whole_lines(fleet.directory / "json")))  # noqa: E731
        wait_for("the end in the other", lambda: told() and told()[-1]["phase"] == "destroyed")
        assert {one["id"] for one in told()} == {"one"} and told()[-1]["agent_usd"] > 0
    finally:
        for process in (following, every):
            process.kill()
            process.wait(30)
