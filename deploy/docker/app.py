"""An agent behind HTTP, as an example: `POST /` with a task answers with its result, `GET` says that it is there. With a task on the command
line it does that one and ends. It knows nothing of the sidecar; X-Tenant is handed to the agent, where `labels.tenant_from` finds it.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ResultMessage


def environment(tenant: str) -> dict[str, str]:
    given = {"TENANT": tenant} if tenant else {}
    # From a file the key is in no environment but the CLI's.
    if file := os.environ.get("ANTHROPIC_API_KEY_FILE"):
        given["ANTHROPIC_API_KEY"] = Path(file).read_text().strip()
    return given


async def work(task: str, tenant: str = "") -> dict:
    options = ClaudeAgentOptions(allowed_tools=["Bash"], env=environment(tenant))
    result = {"subtype": "none"}
    async with ClaudeSDKClient(options) as client:
        await client.query(task)
        async for message in client.receive_response():
            if isinstance(message, ResultMessage):
                result = {"subtype": message.subtype, "session": message.session_id, "cost_usd": message.total_cost_usd, "result": message.result}
    return result


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    method, *_ = (await reader.readline()).decode().split()
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    try:
        task = (await reader.readexactly(int(headers.get("content-length", 0)))).decode()
        status, body = 200, await work(task, headers.get("x-tenant", "")) if method == "POST" else {}
    except Exception as error:
        status, body = 500, {"subtype": "thrown", "result": repr(error)}
    said = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d .\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(said), said))
    await writer.drain()
    writer.close()


async def main() -> int:
    # As a container's first process it is asked once, and would hear nothing without a handler. A client that is left ends its agent in order.
    this = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    if sys.argv[1:]:
        result = await work(" ".join(sys.argv[1:]), os.environ.get("TENANT", ""))
        print(json.dumps(result))
        return 0 if result["subtype"] == "success" else 1
    server = await asyncio.start_server(answer, "", int(os.environ.get("PORT", "8080")))
    with contextlib.suppress(asyncio.CancelledError):
        await server.serve_forever()
    working = [task for task in asyncio.all_tasks() if task is not this]
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    return 0


sys.exit(asyncio.run(main()))
