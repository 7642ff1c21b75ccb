"""Stands in for `cloudflare/proxy-everything`, the container through which workerd reaches a container's ports where there is no Cloudflare: it shares their
network, and joins whoever sends CONNECT to the port that the header X-Dst-Addr names. What containers send is not looked at here.
"""

import asyncio
import contextlib

PORT = 39001


async def pump(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(65536):
            to.write(piece)
            await to.drain()
        to.write_eof()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        if not head[0].startswith("CONNECT "):
            # GET /ca and PUT /egress: there is nothing to be told.
            await reader.readexactly(int(headers.get("content-length", 0)))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        else:
            port = int(headers["x-dst-addr"].rpartition(":")[2])
            try:
                inside, outside = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await asyncio.gather(pump(reader, outside), pump(inside, writer))
                outside.close()
    with contextlib.suppress(OSError):
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "0.0.0.0", PORT)
    await server.serve_forever()


asyncio.run(main())
