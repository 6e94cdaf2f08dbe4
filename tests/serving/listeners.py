"""Find the ports on which the processes of a server listen. The kernel lists them in /proc."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening TCP socket. `title` is the command line of the process that owns it."""

    host: str
    port: int
    title: str

    @property
    def is_local(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def reachable_at(self) -> tuple[str, int]:
        """Return an address and a port to which a client on this machine can connect."""
        return ("127.0.0.1" if ipaddress.ip_address(self.host).is_unspecified else self.host), self.port


def listeners_of(pids: Iterable[int]) -> list[Listener]:
    """Return every TCP socket that one of these processes listens on."""
    titles = {}
    for pid in pids:
        with suppress(OSError):  # the process may have ended since it was listed
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    titles[os.readlink(link)] = title
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            title = titles.get(f"socket:[{fields[9]}]")
            if fields[3] == _LISTEN and title is not None:
                address, port = fields[1].split(":")
                found.append(Listener(_readable(address), int(port, 16), title))
    return found


def _readable(address: str) -> str:
    """Return an IP address in its usual notation. In /proc it is 32-bit words in native byte order, in hexadecimal."""
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    text = socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)
    return text.removeprefix("::ffff:")
