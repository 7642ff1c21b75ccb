"""An app as people host it: an agent for each name that is posted to, in one process, over HTTP. It knows nothing of a sidecar.

`POST /NAME` with a text answers with the result of that turn; `?resume=ID` goes on with a session of an earlier container. SIGTERM ends it. `AGENT_USER`
is who the agents are, `LISTEN` where it is reached.
"""

import asyncio
import json
import os
import signal
from urllib.parse import parse_qs, urlsplit

from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ResultMessage

clients: dict[str, tuple[asyncio.Lock, ClaudeSDKClient]] = {}


async def turn(name: str, resume: str | None, text: str) -> dict:
    if name not in clients:
        user = os.environ.get("AGENT_USER")
        home = {"HOME": f"/home/{user}"} if user else {}
        options = ClaudeAgentOptions(
            cwd=os.environ.get("WORK", "/tmp"), allowed_tools=["Bash"], resume=resume, user=user, env=home
        )
        clients[name] = asyncio.Lock(), ClaudeSDKClient(options)
    lock, client = clients[name]
    async with lock:
        if not getattr(client, "is_there", False):
            await client.connect()
            client.is_there = True
        await client.query(text)
        async for message in client.receive_response():
            if isinstance(message, ResultMessage):
                return {
                    "session_id": message.session_id,
                    "subtype": message.subtype,
                    "turns": message.num_turns,
                    "result": message.result,
                    "cost_usd": message.total_cost_usd,
                }
    return {"subtype": "none"}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    method, target, _ = (await reader.readline()).decode().split()
    path = urlsplit(target)
    length = 0
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        if name.lower() == "content-length":
            length = int(value)
    text = (await reader.readexactly(length)).decode()
    try:
        body = {} if method == "GET" else await turn(path.path.strip("/"), parse_qs(path.query).get("resume", [None])[0], text)
    except Exception as error:
        body = {"subtype": "thrown", "result": repr(error)}
    said = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))
    await writer.drain()
    writer.close()


async def main() -> None:
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    server = await asyncio.start_server(answer, os.environ.get("LISTEN", "127.0.0.1"), 8080)
    print("ready", flush=True)
    await end.wait()
    server.close()
    # Each in this task: a client ends where it began to end.
    for _, client in clients.values():
        await client.disconnect()


asyncio.run(main())
