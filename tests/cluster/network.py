"""Nodes of one machine with addresses of their own and cables that can be pulled: Linux network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

NET = "10.77.0"
PREFIX = "mont-"
BRIDGE = f"{PREFIX}br"


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def can_make_namespaces() -> bool:
    """Whether this user may: root outside of a container that forbids it. Whatever else is wrong is an error."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        ip("netns", "add", f"{PREFIX}probe")
    except subprocess.CalledProcessError as error:
        if "not permitted" in error.stderr or "denied" in error.stderr:
            return False
        raise
    ip("netns", "del", f"{PREFIX}probe")
    return True


class Network:
    """A bridge of this machine, `NET`.1, and at it a namespace for each node, which reaches the machine itself too."""

    def __init__(self) -> None:
        self.close()  # what a test that was killed has left
        self._nodes = 0
        self._cut: list[tuple[float, str]] = []
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")

    def add_node(self) -> str:
        """A namespace, connected."""
        self._nodes += 1
        number = self._nodes + 1
        name = f"{PREFIX}{number}"
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", BRIDGE, "up")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        ip("-n", name, "addr", "add", f"{NET}.{number}/24", "dev", "eth0")
        ip("-n", name, "route", "add", "default", "via", f"{NET}.1")
        return name

    def cut(self, name: str, seconds: float = float("inf")) -> None:
        """Pull the cable, until `heal` is called after so long: nothing arrives any more, no connection is closed."""
        ip("link", "set", name, "down")
        self._cut.append((time.monotonic() + seconds, name))

    def is_cut(self, name: str) -> bool:
        return any(cut == name for _, cut in self._cut)

    def heal(self) -> None:
        """Put back what has been out for its time."""
        for due, name in [cut for cut in self._cut if cut[0] < time.monotonic()]:
            self._cut.remove((due, name))
            ip("link", "set", name, "up")

    def close(self) -> None:
        for line in ip("-brief", "link").splitlines():  # open connections keep a namespace and its cable
            name = line.split()[0].partition("@")[0]
            if name.startswith(PREFIX):
                ip("link", "del", name)
        for line in ip("netns", "list").splitlines():
            if line.startswith(PREFIX):
                ip("netns", "del", line.split()[0])


def inside(name: str) -> list[str]:
    """What runs a command in a namespace, in its place."""
    return ["ip", "netns", "exec", name]
