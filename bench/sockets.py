"""The cost of an idle WebSocket."""

from __future__ import annotations

import asyncio
import resource
import time

from bench import processes
from bench.client import WebSocket
from bench.results import Measurement, Place
from bench.targets import Service

#: Concurrent handshakes.
_CONNECTING = 50


def measure(service: Service, number: int, seconds: float, place: Place) -> Measurement:
    """Open sockets, and compare the web processes before and with them.

    Args:
      service: Inferno.
      number: number of sockets.
      seconds: how long they stay idle; longer than the server's ping interval, to include a ping.
      place: target, workload and repeat.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(max(soft, number + 500), hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return asyncio.run(_measure(service, number, seconds, place))


async def _measure(service: Service, number: int, seconds: float, place: Place) -> Measurement:
    limit = asyncio.Semaphore(_CONNECTING)

    async def connect() -> WebSocket:
        async with limit:
            socket = await WebSocket.connect(service.port, "/ws")
            # The handshake is answered before the socket is served; a pong shows that it is.
            socket.send(b'{"type":"ping"}')
            await socket.receive()
            return socket

    before = processes.snapshot()
    began = time.perf_counter()
    opened = await asyncio.gather(*(connect() for _ in range(number)))
    open_s = time.perf_counter() - began
    # `receive` answers the server's pings.
    listening = [asyncio.create_task(socket.receive()) for socket in opened]
    idle_from, began = processes.snapshot(), time.perf_counter()
    await asyncio.sleep(seconds)
    after, idle_s = processes.snapshot(), time.perf_counter() - began
    lost = sum(task.done() for task in listening)
    for task, socket in zip(listening, opened, strict=True):
        task.cancel()
        socket.close()
    await asyncio.gather(*listening, return_exceptions=True)
    rss = processes.rss_bytes(after)
    grown = rss["web"] - processes.rss_bytes(before)["web"]
    cpu = processes.cpu_s(idle_from, after)
    return Measurement(
        **place,
        scenario=f"{number} idle sockets",
        seconds=idle_s,
        answered=0,
        errors={"lost": lost} if lost else {},
        cpu_s=cpu,
        rss_bytes=rss,
        values={
            "web_bytes_per_socket": grown / number,
            "web_cpu_us_per_socket_and_s": cpu.get("web", 0.0) / number / idle_s * 1e6,
            "sockets_opened_per_s": number / open_s,
        },
    )
