"""A proxy for one TCP connection, which does to it what bad networks do."""

from __future__ import annotations

import select
import socket
import struct
import sys
import threading
import time

from helpers import HANG_SECONDS, Peer, split_address

_RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class _Flow:
    """One direction of the connection; the proxy's thread alone touches `data`."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.data, self.due = b"", 0.0  # still to be passed on, and not before then
        self.stalled = False
        self.left = sys.maxsize  # bytes until the cut; below 0 after it
        self.ended = False  # the source has sent its last


class Proxy:
    """Carries what `peer` sends up to a server, and back down, in its own thread."""

    def __init__(
        self,
        address: str,
        *,
        piece_bytes: int = 65536,
        delay_seconds: float = 0,
        receive_buffer: int = 0,
    ) -> None:
        """piece_bytes: passed on at once, each of them after the delay."""
        self._piece_bytes, self._delay_seconds = piece_bytes, delay_seconds
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.peer = Peer(f"127.0.0.1:{listener.getsockname()[1]}")
            client, _ = listener.accept()
        server = socket.socket()
        if receive_buffer:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        server.connect(split_address(address))
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setblocking(False)
        self.up, self.down = _Flow(client, server), _Flow(server, client)
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._closing = self._resetting = False
        self._thread = threading.Thread(target=self._carry, name="proxy")
        self._thread.start()

    def stall(self, flow: _Flow) -> None:
        """Stop one direction."""
        flow.stalled = True
        self._wake_sender.send(b"\0")

    def cut(self, flow: _Flow, after_bytes: int) -> None:
        """End one direction with a FIN after so many more bytes; drop the rest."""
        flow.left = after_bytes

    def reset(self) -> None:
        """Break both connections with a RST, and wait until that is done."""
        self._resetting = True
        self.close()

    def close(self) -> None:
        """Close both connections and wait until that is done; again does nothing."""
        if not self._closing:
            self._closing = True
            self._wake_sender.send(b"\0")
            self._thread.join(HANG_SECONDS)
            for each in (self._wake_sender, self._wake_receiver, self.peer):
                each.close()

    def _carry(self) -> None:
        flows = (self.up, self.down)
        with self.up.source, self.down.source:
            try:
                while not self._closing and not all(flow.ended for flow in flows):
                    self._carry_some([f for f in flows if not (f.stalled or f.ended)])
            except OSError:  # one side is gone, and the other one is to learn of it
                self._resetting = True
            if self._resetting:
                for flow in flows:
                    flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def _carry_some(self, flows: list[_Flow]) -> None:
        now = time.monotonic()
        readers = [self._wake_receiver, *(f.source for f in flows if not f.data)]
        writers = [f.target for f in flows if f.data and f.due <= now]
        waits = [f.due - now for f in flows if f.data and f.due > now]
        ready = select.select(readers, writers, [], min(waits, default=None))
        if self._wake_receiver in ready[0]:
            self._wake_receiver.recv(64)
        for flow in flows:
            if not flow.data and flow.source in ready[0]:
                self._read(flow)
            elif flow.data and flow.target in ready[1]:
                sent = flow.target.send(flow.data[: self._piece_bytes])
                flow.data = flow.data[sent:]
            else:
                continue
            flow.due = time.monotonic() + self._delay_seconds
            if not flow.data and (flow.ended or flow.left == 0):
                flow.left = -1  # from now on all is dropped
                flow.target.shutdown(socket.SHUT_WR)

    def _read(self, flow: _Flow) -> None:
        chunk = flow.source.recv(65536)
        flow.ended = not chunk
        flow.data = chunk[: max(0, flow.left)]
        flow.left -= len(flow.data)
