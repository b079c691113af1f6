"""The group over which the trainer hands weights to servers: rank 0 here, their workers behind it.

SGLang joins a group of its own with torch's private layout of keys in a store; this is the other end,
without SGLang.  A group name is never free again on a server, so every group has a fresh one.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

JOIN_S = 60.0
BROADCAST_S = 60.0  # one bucket; a server that refuses it keeps the others waiting so long


class BroadcastGroup:
    """A store that this process hosts, and the group once all have joined."""

    def __init__(self, name: str, num_receivers: int, address: str, device: torch.device) -> None:
        listening = socket.create_server((address, 0))
        self.name = name
        self.address = address
        self.port = int(listening.getsockname()[1])
        self.size = num_receivers + 1
        self.device = device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._group: Any = None  # a ProcessGroup of the backend
        # Only on the address that the servers are told: whoever reaches the store can take part.
        self._store = dist.TCPStore(
            address,
            self.port,
            self.size,
            is_master=True,
            timeout=datetime.timedelta(seconds=JOIN_S),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )

    def join(self) -> None:
        """Wait for the servers' workers.  Raises RuntimeError when one does not come."""
        store: dist.Store = self._store
        # As torch nests them for a group with this name; gloo speaks only to these keys.
        for prefix in (self.name, f"{self.name}/", f"{self.device.type}/"):
            store = dist.PrefixStore(prefix, store)
        if self.backend == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = datetime.timedelta(seconds=BROADCAST_S)
            self._group = dist.ProcessGroupNCCL(store, 0, self.size, nccl)
            return
        gloo = getattr(dist.ProcessGroupGloo, "_Options")()  # noqa: B009 - the stubs lack it
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=self.address)]
        gloo._timeout = datetime.timedelta(seconds=BROADCAST_S)
        self._group = dist.ProcessGroupGloo(store, 0, self.size, gloo)

    def broadcast(self, flat: torch.Tensor) -> None:
        """Send bytes to all.  Raises RuntimeError when one is gone, and after `abort`."""
        assert self._group is not None, "nobody joined"
        self._group.broadcast(flat, 0).wait()

    def abort(self) -> None:
        """Close the connections: whoever waits in a broadcast is let go with an error."""
        if self._group is not None:
            self._group.abort()
        self._group = None


def address_for(url: str) -> str:
    """This machine's address on the way to a server."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    family, _, _, _, where = socket.getaddrinfo(host, port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # sends nothing
        return str(probe.getsockname()[0])
