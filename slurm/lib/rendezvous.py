"""The meeting point of a run's ranks: a store on a port that is free for sure, on one address only.

    python rendezvous.py serve FILE ADDRESS   listen, write `ADDRESS PORT MACHINE` to FILE, serve until the parent ends
    python rendezvous.py local PEER...        print interface and own address towards the first PEER that is elsewhere
    python rendezvous.py reach FILE HEAD      connect once to what FILE says; HEAD is its node's name, for messages

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

REACH_SECONDS = 60  # the store listens before its file is there; a first packet may wait for a route
SIOCGIFADDR = 0x8915  # ioctl: the address of a network interface
PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    if len(argv) == 3 and argv[0] == "serve":
        return serve(Path(argv[1]), argv[2])
    if len(argv) >= 2 and argv[0] == "local":
        return local(argv[1:])
    if len(argv) == 3 and argv[0] == "reach":
        return reach(Path(argv[1]), argv[2])
    return fail("usage: rendezvous.py serve FILE ADDRESS | local PEER... | reach FILE HEAD")


def fail(message: str) -> int:
    """One line on stderr, and the status of bad input."""
    print(f"error: {message}", file=sys.stderr)
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
    fresh.write_text(f"{address} {port} {machine()}\n")
    fresh.replace(file)

    from torch.distributed import TCPStore

    listener_fd = listener.detach()
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener_fd)
    while store is not None:
        signal.pause()
    return 0


def local(peers: list[str]) -> int:
    """Print `INTERFACE ADDRESS`. A node's own name often means 127.0.1.1: the way to another node says more."""
    found, why = [], ""
    for peer in peers:
        try:
            found.append(local_address(peer))
        except OSError as error:
            why = (
                f"{peer}: its name means no address here ({error.strerror}); ask the cluster's administrators"
            )
            continue
        if not loopback(found[-1][1]):
            break
    if not found:
        return fail(why)
    print(*found[0] if all(loopback(address) for _, address in found) else found[-1])
    return 0


def reach(file: Path, head: str) -> int:
    """Connect to the store once; says in one line what keeps this node from it."""
    address, port, its_machine = file.read_text().split()
    own = socket.gethostname()
    if loopback(address) and its_machine != machine():
        return fail(
            f"{head}: gives {address} as its address, which {own} takes for itself; its /etc/hosts or name "
            f"service must give {head} an address of its network"
        )
    try:
        socket.create_connection((address, int(port)), REACH_SECONDS).close()
    except OSError as error:
        why = error.strerror or f"no answer within {REACH_SECONDS} s"
        return fail(
            f"{own}: cannot reach {head} at {address} port {port} ({why}); a firewall between the nodes?"
        )
    return 0


def machine() -> str:
    """The same on all nodes of one machine, as a practice cluster's are; another one after each start."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def loopback(address: str) -> bool:
    """Whether the address is always the machine's own."""
    return address.startswith("127.") or address == "::1"


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
    if loopback(address):
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
