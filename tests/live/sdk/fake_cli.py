"""A CLI of a hundred lines: speaks stream-json, and asks the scripted API as often as the message says. Its lines are numbered, so that
whoever reads them can tell whether one is missing."""

import http.client
import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid

MODEL = "claude-opus-5-5"
# The scripted API's usage, in the CLI's words.
KINDS = {
    "inputTokens": "input_tokens",
    "outputTokens": "output_tokens",
    "cacheReadInputTokens": "cache_read_input_tokens",
    "cacheCreationInputTokens": "cache_creation_input_tokens",
}
PRICES = {"input_tokens": 4, "output_tokens": 20, "cache_read_input_tokens": 0.20, "cache_creation_input_tokens": 5}
# Between its word that it asks and the question: time to be interrupted in, as a model's answer is.
THINKS = float(os.environ.get("FAKE_THINKS", "0.05"))
HOST = os.environ["ANTHROPIC_BASE_URL"].removeprefix("http://")

session = str(uuid.uuid4())
sums = dict.fromkeys(PRICES, 0)
lines = 0
refusal = None
given: queue.Queue = queue.Queue()


def say(**line: object) -> None:
    global lines
    lines += 1
    print(json.dumps({**line, "session_id": session, "n": lines}), flush=True)


def ask(text: str) -> dict:
    connection = http.client.HTTPConnection(HOST, timeout=60)
    message = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    connection.request("POST", "/v1/messages", json.dumps(message), {"x-claude-code-session-id": session})
    return json.loads(connection.getresponse().read())


def result(subtype: str, text: str) -> None:
    cost = sum(n * PRICES[kind] for kind, n in sums.items()) / 1e6
    used = {MODEL: {**{name: sums[kind] for name, kind in KINDS.items()}, "webSearchRequests": 0, "costUSD": cost}}
    say(type="result", subtype=subtype, is_error=False, num_turns=1, result=text, total_cost_usd=cost, modelUsage=used)


def control(message: dict) -> str:
    """What was asked; it is done."""
    global refusal
    request = message["request"]
    if request["subtype"] == "apply_flag_settings":
        refusal = request["settings"]["hooks"]["UserPromptSubmit"][0]["hooks"][0]["command"]
    say(type="control_response", response={"subtype": "success", "request_id": message["request_id"], "response": {}})
    return request["subtype"]


def interrupted() -> bool:
    """Whether somebody says so while it thinks."""
    end, later, told = time.monotonic() + THINKS, [], False
    while not told and (left := end - time.monotonic()) > 0:
        try:
            message = given.get(timeout=left)
        except queue.Empty:
            break
        if message is not None and message["type"] == "control_request":
            told = control(message) == "interrupt"
        else:
            later.append(message)
    for message in later:
        given.put(message)
    return told


def turn(text: str) -> None:
    told = subprocess.run(["sh", "-c", refusal], capture_output=True).stdout if refusal else b""
    if b"block" in told:
        result("success", json.loads(told)["reason"])
        return
    say(type="system", subtype="init", model=MODEL)
    for _ in range(int(text)):
        say(type="system", subtype="status", status="requesting")
        if interrupted():
            result("error_during_execution", "interrupted")
            return
        answer = ask(text)
        for kind in sums:
            sums[kind] += answer["usage"][kind]
        say(type="assistant", message=answer, parent_tool_use_id=None)
    result("success", "done")


def read() -> None:
    for line in sys.stdin:
        given.put(json.loads(line))
    given.put(None)


threading.Thread(target=read, daemon=True).start()
while (message := given.get()) is not None:
    if message["type"] == "control_request":
        control(message)
    elif message["type"] == "user":
        turn(message["message"]["content"])
say(type="system", subtype="bye", lines=lines + 1)
