"""The meeting point of a run's ranks: a store on a port that is free for sure, on one address only.

    python rendezvous.py serve FILE ADDRESS   listen, write `ADDRESS PORT` to FILE, serve until the parent ends
    python rendezvous.py local PEER           print the interface and own address towards PEER

torchrun's own store takes a port that was free a moment ago and listens on every address of the machine. Here
the kernel picks the port of a socket that is never closed again, so nobody can come between, and the socket is
bound to ADDRESS: 127.0.0.1 on a single node, the address towards the other nodes else. Ranks that connect
before torch is imported wait in the socket's queue.
"""

import ctypes
import os
import signal
import socket
import struct
import sys
from pathlib import Path

SIOCGIFADDR = 0x8915  # ioctl: the address of a network interface
PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    if len(argv) == 3 and argv[0] == "serve":
        return serve(Path(argv[1]), argv[2])
    if len(argv) == 2 and argv[0] == "local":
        print(*local_address(argv[1]))
        return 0
    print("error: usage: rendezvous.py serve FILE ADDRESS | local PEER", file=sys.stderr)
    return 2


def serve(file: Path, address: str) -> int:
    """Hold the store until this process is ended, or its parent is."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    for number in (signal.SIGUSR1, signal.SIGTERM):  # the ranks need the store while they save
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.bind((address, 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    fresh = file.with_suffix(".new")
    fresh.write_text(f"{address} {port}\n")
    fresh.replace(file)

    from torch.distributed import TCPStore

    listener_fd = listener.detach()
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener_fd)
    while store is not None:
        signal.pause()
    return 0


def local_address(peer: str) -> tuple[str, str]:
    """(interface, own address) of the way to `peer`, a name or an address."""
    info = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, target = sorted(info)[0]  # IPv4 first
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # a datagram socket: nothing is sent
        own = probe.getsockname()[0]
    return interface_of(own), own


def interface_of(address: str) -> str:
    """The interface that has the address; 127.x is the loopback's whatever it is listed with."""
    if address.startswith("127.") or address == "::1":
        return "lo"
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
