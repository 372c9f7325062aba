"""Nodes of one machine with addresses of their own and cables that can be pulled: Linux network namespaces."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field

NET = "10.77.0"
PREFIX = "mont-"
BRIDGE = f"{PREFIX}br"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def can_make_namespaces() -> bool:
    """Whether this user may: root, with `ip` and a kernel that has bridges."""
    try:
        Network().close()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@dataclass
class Network:
    """A bridge of this machine, `NET`.1, and at it a namespace for each node, which reaches the machine itself too."""

    _names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names += left_behind()  # by a test that was killed
        if self._names:
            self.close()
            self._names.clear()
        ip("link", "add", BRIDGE, "type", "bridge")
        try:
            ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
            ip("link", "set", BRIDGE, "up")
        except BaseException:
            ip("link", "del", BRIDGE)
            raise

    def add_node(self) -> str:
        """A namespace, connected."""
        number = len(self._names) + 2
        name = f"{PREFIX}{number}"
        ip("netns", "add", name)
        self._names.append(name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", BRIDGE, "up")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        ip("-n", name, "addr", "add", f"{NET}.{number}/24", "dev", "eth0")
        ip("-n", name, "route", "add", "default", "via", f"{NET}.1")
        return name

    def cut(self, name: str) -> None:
        """Pull the cable: nothing arrives any more, no connection is closed."""
        ip("link", "set", name, "down")

    def heal(self, name: str) -> None:
        ip("link", "set", name, "up")

    def close(self) -> None:
        for name in self._names:
            ip("netns", "del", name)
        ip("link", "del", BRIDGE)


def left_behind() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX)]


def inside(name: str) -> list[str]:
    """What runs a command in a namespace, in its place."""
    return ["ip", "netns", "exec", name]
