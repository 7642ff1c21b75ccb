"""The page at `/` in a real browser, which finds nothing but loopback: what is shown, what is said, and what is asked of whom.

With `PAGE_SHOTS=DIR`, what it looks like is left there; `docs/page.png` is the one called `page`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import harness
import pytest
from harness import wait_for
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

AXE = Path(os.environ.get("AXE_CORE", harness.ROOT / ".cache/axe/node_modules/axe-core/axe.min.js"))
SHOTS = os.environ.get("PAGE_SHOTS")
# It says what it is told to say.
PUPPET = "import json, sys\nfor line in sys.stdin:\n    told = json.loads(line)\n    if 'say' in told: print(json.dumps(told['say']), flush=True)"
OPUS = "claude-opus-5-5"


class Yard:
    """Wrappers that meet, and their address."""

    def __init__(self, directory: Path):
        self.port = harness.free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.socket = directory / "hub.sock"
        self.running: list = []

    def argv(self, what: str, *flags: str) -> list[str]:
        return [str(harness.binary()), what, "--listen", f"127.0.0.1:{self.port}", "--socket", str(self.socket), *flags]

    def hub(self) -> subprocess.Popen:
        hub = subprocess.Popen(self.argv("hub"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.running.append(hub)
        wait_for("the hub", lambda: harness.listens(self.port))
        return hub

    def puppet(self, session: str, *flags: str) -> Puppet:
        puppet = Puppet(self, session, flags)
        self.running.append(puppet.process)
        return puppet

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.wait(30)


class Puppet:
    def __init__(self, yard: Yard, session: str, flags: tuple):
        argv = [*yard.argv("run", "--usage-poll=false", *flags, "--"), "python3", "-u", "-c", PUPPET, *harness.STREAM_JSON[1:]]
        self.session, self.n = session, 0
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.say(type="system", subtype="init", model=OPUS)

    def write(self, line: dict) -> None:
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def say(self, **line) -> None:
        self.write({"say": {"session_id": self.session, **line}})
        self.process.stdout.readline()

    def prompt(self) -> None:
        self.write(harness.user("a prompt that nobody is to see"))

    def answer(self, *blocks: dict) -> None:
        self.n += 1
        usage = {"input_tokens": 1200, "cache_read_input_tokens": 30_000, "output_tokens": 340}
        message = {"id": f"msg_{self.session}_{self.n}", "role": "assistant", "model": OPUS, "usage": usage, "content": list(blocks)}
        self.say(type="assistant", message=message)

    def tool(self, name: str) -> None:
        self.answer({"type": "tool_use", "id": f"toolu_{self.n}", "name": name, "input": {"command": "nothing to see"}})

    def tool_result(self, error: bool = False) -> None:
        result = {"type": "tool_result", "tool_use_id": f"toolu_{self.n - 1}", "is_error": error, "content": "nothing to see"}
        self.say(type="user", message={"role": "user", "content": [result]})

    def result(self, usd: float) -> None:
        used = {"inputTokens": 1200 * self.n, "outputTokens": 340 * self.n, "cacheReadInputTokens": 30_000 * self.n, "costUSD": usd}
        models = {OPUS: {**used, "contextWindow": 200_000}}
        self.say(type="result", subtype="success", is_error=False, num_turns=self.n, total_cost_usd=usd, modelUsage=models)


@pytest.fixture
def yard(tmp_path):
    yard = Yard(tmp_path)
    yield yard
    yard.close()


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        yield driver
        driver.quit()


@pytest.fixture
def page(chromium, yard):
    page = Page(chromium, yard)
    yield page
    chromium.get("about:blank")


class Page:
    def __init__(self, driver, yard: Yard):
        self.driver, self.url = driver, yard.url
        self.look("light")
        driver.get_log("browser"), driver.get_log("performance")

    def open(self) -> None:
        # Whoever runs first serves, but not before it relays.
        wait_for("somebody who serves", lambda: harness.listens(urlsplit(self.url).port))
        self.driver.get(self.url)

    def look(self, scheme: str, width: int = 1440, height: int = 900) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def js(self, script: str, *args):
        return self.driver.execute_script(script, *args)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def shows(self, selector: str, *parts: str) -> None:
        try:
            wait_for(f"{parts} in {selector}", lambda: all(part in self.text(selector) for part in parts))
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.text(selector)!r}") from None

    def press(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def focuses(self, what: str) -> None:
        focused = lambda: self.js("const a = document.activeElement; return a.id || a.innerText.trim() || a.tagName")
        try:
            wait_for(f"focus on {what}", lambda: focused() == what)
        except AssertionError as error:
            raise AssertionError(f"{error}: {focused()!r}") from None

    def clean(self, lost: bool = False) -> None:
        """Nothing on the console, and nothing asked of anybody else."""
        said = [line for line in self.driver.get_log("browser") if not (lost and "net::ERR" in line["message"])]
        assert said == []
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
        assert asked and all(url.startswith(self.url) or url.startswith("data:") for url in asked), asked

    def audit(self) -> None:
        self.js(AXE.read_text())
        found = self.driver.execute_async_script("axe.run(document, {resultTypes: ['violations']}).then(arguments[0])")
        bad = [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found["violations"]]
        assert bad == [] and len(found["passes"]) > 10

    def fits(self) -> None:
        """Nothing hangs over."""
        widths = self.js("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
        assert widths[0] <= widths[1], widths

    def shot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(exist_ok=True)
            Path(SHOTS, f"{name}.png").write_bytes(packed(self.driver.get_screenshot_as_png()))


def packed(png: bytes) -> bytes:
    """The same picture, smaller: a browser packs in haste."""
    at, pixels, rest = 8, b"", []
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += length + 12
        if kind == b"IDAT":
            pixels += body
        else:
            rest.append((kind, body))
    rest.insert(-1, (b"IDAT", zlib.compress(zlib.decompress(pixels), 9)))
    chunk = lambda kind, body: len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)
    return png[:8] + b"".join(chunk(*one) for one in rest)


def test_sessions_come_change_and_go_without_a_reload(yard, page):
    yard.hub()
    page.open()
    page.shows("#empty", "No agent runs here now", "agent-sidecar run")
    page.shows("#total-sessions", "0")
    page.audit()
    page.shot("empty")
    page.js("window.mark = 'not reloaded'")
    one = yard.puppet("11111111-aaaa-4aaa-8aaa-111111111111", "--tenant", "acme", "--max-cost-usd", "0.50")
    page.shows("#rows", "11111111", "acme", "model")
    one.prompt()
    one.tool("Bash")
    page.shows("#rows", "Bash", "tool", "opus-5-5", "round 1")
    one.tool_result()
    one.answer({"type": "text", "text": "a secret answer"})
    one.result(0.41)
    page.shows("#rows", "$0.4100", "82 %", "idle", "16 %", "success")
    page.shows("#total-cost", "$0.4100")
    two = yard.puppet("22222222-bbbb-4bbb-8bbb-222222222222")
    page.shows("#rows", "11111111", "22222222")
    page.shows("#total-sessions", "2")
    two.process.stdin.close()
    two.process.wait(60)
    wait_for("the second to go", lambda: "22222222" not in page.text("#rows"))
    assert "11111111" in page.text("#rows") and page.js("return window.mark") == "not reloaded"
    assert "secret" not in page.js("return document.documentElement.outerHTML")
    page.clean()


def test_a_session_opens_with_its_timeline_which_goes_on(yard, page):
    yard.hub()
    one = yard.puppet("33333333-cccc-4ccc-8ccc-333333333333", "--max-turns", "40")
    one.prompt()
    for name in ("Read", "Grep"):
        one.tool(name)
        one.tool_result(error=name == "Grep")
    page.open()
    page.shows("#rows", "33333333")
    page.js("document.querySelector('#rows tr').click()")
    page.shows("#detail", "33333333-cccc-4ccc-8ccc-333333333333", "1 ok, 1 failed", "turns, turn")
    page.shows("#timeline", "turn 1 began", "Read: ok", "Grep: error", "31.2k in")
    one.answer({"type": "text", "text": "so"})
    one.result(0.08)
    page.shows("#timeline", "turn 1: success", "$0.0800")
    first = page.text("#timeline li:first-child")
    assert "turn 1: success" in first, first
    assert page.js("return document.querySelectorAll('#chart rect').length") >= 4
    assert "tools 2" in page.text("#chart-words")
    one.process.stdin.close()
    one.process.wait(60)
    # It stays open, with its last entry.
    page.shows("#facts", "ended")
    page.shows("#timeline", "clean, exit code 0")
    page.clean()


def test_the_keyboard_alone_is_enough(yard, page):
    puppets = [yard.puppet(f"{n}{n}{n}{n}{n}{n}{n}{n}-0000-4000-8000-000000000000") for n in range(4, 7)]
    page.open()
    page.shows("#rows", *(puppet.session[:8] for puppet in puppets))
    page.press(Keys.TAB)
    page.focuses("Skip to the sessions")
    page.press(Keys.ENTER, Keys.TAB)
    page.focuses("filter")
    # Past the table's box and the heads, each of which sorts, to one row.
    page.press(Keys.TAB)
    page.focuses("table-box")
    heads = page.js("return document.querySelectorAll('#heads button').length")
    page.press(Keys.TAB)
    page.press(Keys.ENTER)
    assert page.js("return document.querySelector('#heads th').ariaSort") == "ascending"
    page.press(*[Keys.TAB] * heads)
    page.focuses(puppets[0].session[:8])
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "one sees where one is"
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    page.focuses(puppets[2].session[:8])
    page.press(Keys.ARROW_UP, Keys.ENTER)
    page.shows("#detail-title", puppets[1].session)
    page.focuses("detail-title")
    page.press(Keys.ESCAPE)
    page.focuses(puppets[1].session[:8])
    assert page.js("return document.querySelector('#detail').hidden")
    page.press("/", "6666")
    wait_for("one row", lambda: page.js("return document.querySelectorAll('#rows tr').length") == 1)
    page.shows("#shown", "1 of 3")
    page.press(Keys.ESCAPE)
    wait_for("all rows", lambda: page.js("return document.querySelectorAll('#rows tr').length") == 3)
    page.clean()


def test_a_hub_that_is_killed_is_said_and_the_next_one_is_found(yard, page):
    hub = yard.hub()
    one = yard.puppet("77777777-dddd-4ddd-8ddd-777777777777")
    page.open()
    page.shows("#rows", "77777777")
    page.shows("#link", "live")
    os.kill(hub.pid, signal.SIGSTOP)
    page.shows("#link", "connection lost, last data")
    page.shows("#said", "Connection lost")
    page.shot("lost")
    page.audit()
    hub.kill()
    hub.wait(30)
    page.shows("#link", "live")
    page.shows("#said", "Connected again")
    one.prompt()
    one.tool("Bash")
    page.shows("#rows", "Bash")
    assert page.js("return document.querySelectorAll('#rows tr').length") == 1
    page.clean(lost=True)


def test_whatever_it_is_called_it_is_text(yard, page):
    evil = "<img src=x onerror=\"document.title='owned'\">"
    one = yard.puppet("88888888-eeee-4eee-8eee-888888888888", "--tenant", "<b onmouseover=alert(1)>t</b>")
    one.prompt()
    one.tool(evil)
    page.open()
    page.shows("#rows", "<img src=x onerror", "<b onmouseover")
    page.js("document.querySelector('#rows tr').click()")
    one.tool_result()
    page.shows("#timeline", "<img src=x onerror")
    assert page.js("return document.querySelectorAll('img, main b[onmouseover]').length") == 0
    assert "Agents" in page.driver.title
    page.clean()


def test_long_names_do_not_push_the_rest_out_of_sight(yard, page):
    one = yard.puppet("88888888-abab-4eee-8eee-888888888888", "--tenant", "a tenant that has a rather long name", "--max-cost-usd", "1")
    one.prompt()
    one.tool("mcp__a_server_with_a_long_name__do_something_quite_long")
    page.look("light", 1400, 900)
    page.open()
    page.shows("#rows", "mcp__a_server_with_a_long_name__do_something_quite_long", "a tenant that has a rather long name")
    hidden = "const it = document.querySelector('#table').parentElement; return it.scrollWidth - it.clientWidth"
    assert page.js(hidden) == 0
    titles = page.js("return [...document.querySelectorAll('#rows [title]')].map((cell) => cell.title).join(' ')")
    assert "quite_long" in titles and "a tenant that has a rather long name" in titles
    page.clean()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_and_fits_a_phone(scheme, yard, page):
    one = yard.puppet("99999999-ffff-4fff-8fff-999999999999", "--max-cost-usd", "0.10", "--mode", "shadow", "--tenant", "acme")
    yard.puppet("aaaaaaaa-ffff-4fff-8fff-999999999999")
    one.prompt()
    for _ in range(3):
        one.tool("Bash")
        one.tool_result(error=True)
    one.answer()
    one.result(0.12)
    page.look(scheme)
    page.open()
    page.shows("#rows", "99999999", "aaaaaaaa", "120 %")
    page.audit()
    page.js("document.querySelector('#rows tr').click()")
    page.shows("#timeline", "cost, session")
    page.audit()
    page.look(scheme, 390, 844)
    page.audit()
    page.fits()
    page.shot(f"phone-{scheme}")
    page.clean()


def step(word: str, results: int, *blocks, **more) -> dict:
    return {"when": {"agent": "main", "prompt_contains": word, "results": results}, "reply": {"blocks": list(blocks), **more}}


def bash(command: str) -> dict:
    return {"tool": "Bash", "input": {"command": command, "description": "a step"}}


SCRIPT = {
    "defaults": {"usage": {"input_tokens": 420, "output_tokens": 900, "cache_read_input_tokens": 61_000, "cache_creation_input_tokens": 2100}},
    "rules": [
        {"when": {"agent": "subagent"}, "reply": {"blocks": ["I look at the handlers, one by one, slowly."], "pace": {"chunk": 1, "chunk_delay_ms": 2000}}},
        {"times": 1, "when": {"prompt_contains": "tests"}, "reply": {"status": 529}},
        step("tests", 0, "Let me see.", bash("sleep 0.3"), {"tool": "Read", "input": {"file_path": "/etc/hostname"}}),
        step("tests", 2, bash("sleep 0.6; false")),
        step("tests", 3, bash("sleep 0.2")),
        step("build", 0, bash("tail -f /dev/null")),
        step("review", 0, {"subagent": "look at the handlers"}),
        step("write", 0, bash("touch here")),
        step("think", 0, "a long thought, " * 200, pace={"chunk": 2, "chunk_delay_ms": 900}),
    ],
    "otherwise": {"blocks": ["done"]},
}


def test_five_real_agents_as_they_are(yard, page, api, tmp_path):
    """What a person sees who looks at a container that works; and the picture of it."""
    served = api(SCRIPT)
    allowed = ["--allowedTools", "Bash,Agent,Task,Read"]
    asks = ["--permission-mode", "default", "--permission-prompt-tool", "stdio"]
    yard.hub()
    page.open()

    def start(args: list, *flags: str) -> harness.Session:
        argv = [*yard.argv("run", *flags), "--", harness.cli("new"), *harness.STREAM_JSON, *args]
        started = harness.Session(argv, served, tmp_path / "home")
        yard.running.append(started.process)
        return started

    builder = start(allowed, "--tenant", "acme", "--team", "build", "--max-cost-usd", "0.25")
    tester = start(allowed, "--tenant", "acme", "--team", "build", "--max-cost-usd", "0.12", "--mode", "shadow")
    reviewer = start(allowed, "--tenant", "acme", "--team", "review", "--max-duration", "2h")
    asker = start(asks, "--tenant", "globex", "--max-turns", "40")
    thinker = start(allowed, "--tenant", "globex", "--max-tokens", "2000000")
    for agent in (builder, tester, reviewer, thinker):
        agent.ask("say hello", 60)
    tester.ask("run the tests", 60)
    tester.ask("run the tests again", 60)
    for agent, text in [(builder, "build it"), (reviewer, "review it"), (asker, "write it"), (thinker, "think")]:
        agent.send(harness.user(text))
    page.shows("#rows", "asks permission", "Bash", "1 subagent", "3 done", "model", "acme · build", "globex")
    page.shows("#total-sessions", "5")
    costs = lambda: sum(s["cost_usd"] for s in json.loads(page.js("return fetch('status').then((a) => a.text())"))["sessions"])
    wait_for("the same sum", lambda: abs(float(page.text("#total-cost").strip("≈ $")) - costs()) < 0.01)
    page.shows("#total-rate", "/h")
    page.audit()
    page.fits()
    page.shot("table-light")
    page.js("[...document.querySelectorAll('#rows tr')].find((row) => row.innerText.includes('3 done')).click()")
    page.shows("#timeline", "turn 3: success", "Bash: error", "retry", "overloaded", "limit")
    page.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    page.look("light", 1360, 850)
    page.shot("page")
    page.look("light", 1440, 1250)
    page.shot("detail-light")
    page.audit()
    page.look("dark", 1440, 1250)
    page.shot("detail-dark")
    page.audit()
    page.look("dark")
    page.press(Keys.ESCAPE)
    page.shot("table-dark")
    page.look("light", 390, 844)
    page.fits()
    page.shot("phone")
    page.clean()
