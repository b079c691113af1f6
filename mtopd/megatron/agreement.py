"""What all ranks of a job have to see alike, and what one rank decides for all.

Ranks plan for themselves, from files that each of them lists and reads.  Storage may show one node
what another does not see yet (NFS keeps listings and attributes for up to a minute), and a run
directory on a local disk is another folder on every node: then ranks would plan differently, and
train, without a word.  So what a phase begins with is compared by one all-reduce of 16 bytes, and
where the way through the code depends on a file, rank 0 looks and tells the others.

Work that takes ranks unlike times (``apart``) ends on the store: a collective would give up on the
slowest after minutes.

Every function here but ``deal`` is collective, and what a rank raises as MtopdError or OSError while it looks is
raised on every rank, with its name.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from mtopd.megatron.parallel import Ranks
from mtopd.run_dir import RunDir
from mtopd.types import MtopdError

T = TypeVar("T")
_DECIDED_WITHIN = datetime.timedelta(days=7)
_decisions = itertools.count()  # every rank comes to the same number

# Seconds until ranks look again that see different files: caches of attributes expire.
STALE_WAITS_S: tuple[float, ...] = (1, 4, 15, 45)
STALE = (
    "a directory listing is stale, or they look at different folders: let all hosts mount one run "
    "directory (on NFS with lookupcache=none, or wait a minute) and start the same command again"
)


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What came of a rank's look: ``error`` or ``value``."""

    value: T | None
    error: str | None = None

    def get(self) -> T:
        return self.value  # type: ignore[return-value]


def decide(ranks: Ranks, look: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank: a small value.  The others do not look.

    They wait in the job's key-value store: rank 0 may hash or write a large checkpoint, which takes
    longer than a collective may.  When it dies, its launcher ends them.
    """
    key = f"decision {next(_decisions)}"
    store = dist.PrefixStore("mtopd", dist.distributed_c10d._get_default_store())
    outcomes: list[_Outcome[T] | None] = [None]
    if ranks.rank == 0:
        outcomes = [_attempt(look)]
        store.set(key, "made")
    else:
        store.wait([key], _DECIDED_WITHIN)
    dist.broadcast_object_list(outcomes, src=0, device=ranks.device)
    (outcome,) = outcomes
    assert outcome is not None
    if outcome.error is not None:
        raise MtopdError(outcome.error)
    return outcome.get()


def gather(ranks: Ranks, look: Callable[[], T]) -> list[T]:
    """What every rank finds, by rank."""
    mine = (socket.gethostname(), _attempt(look))
    found: list[tuple[str, _Outcome[T]]] = [mine] * ranks.world_size
    dist.all_gather_object(found, mine)
    for rank, (host, outcome) in enumerate(found):
        if outcome.error is not None:
            raise MtopdError(f"rank {rank} on host {host}: {outcome.error}")
    return [outcome.get() for _, outcome in found]


def see_alike(
    ranks: Ranks,
    look: Callable[[], T],
    describe: Callable[[T], tuple[bytes, str]],
    *,
    cure: str = STALE,
    waits_s: Sequence[float] = (),
) -> T:
    """What this rank finds, once every rank was found to find the same.

    ``describe`` gives the bytes that are compared, as a digest, and in words what an error tells of
    a rank that differs from rank 0.  While ranks differ and none raises, all look again after each
    of ``waits_s``.
    """
    waits = iter(waits_s)
    while True:
        outcome = _attempt(look)
        compared, said = describe(outcome.get()) if outcome.error is None else (b"", outcome.error)
        if _is_same(ranks, compared + said.encode()):
            if outcome.error is not None:
                raise MtopdError(outcome.error)
            return outcome.get()
        sights: list[tuple[str, str, bool]] = [("", "", False)] * ranks.world_size
        if outcome.error is None:
            said += f" ({hashlib.sha256(compared).hexdigest()[:8]})"
        sight = (socket.gethostname(), said, outcome.error is not None)
        dist.all_gather_object(sights, sight)
        wait = next(waits, None)
        if wait is None or any(failed for *_, failed in sights):
            raise MtopdError(_tell_differences(sights, cure))
        time.sleep(wait)


def see_start_alike(ranks: Ranks, run: RunDir) -> None:
    """Raise MtopdError unless all ranks read what the launcher wrote for this start.

    On a local disk of each host the run directory is another one, with a former start's files.
    """

    def look() -> bytes:
        texts = [path.read_bytes() for path in (run.config, run.manifest)]
        return digest_of(run.generation, *texts, run.prompts.stat().st_size)

    see_alike(
        ranks, look, lambda found: (found, f"reads config, manifest and prompts of {run.path}")
    )


# -- work that takes ranks unlike times ------------------------------------------------------------
BEAT_EVERY_S = 5.0
SILENCE_S = 300.0  # a rank that does not beat for so long is lost
_POLL_S = 0.02, 1.0  # the first wait between two looks, and the longest
_FAILED = 1 << 40  # beyond every number that is dealt
_HEARTS = "apart/hearts"  # one counter a rank for all pieces: rank 0 keeps every key to the end
_pieces = itertools.count()  # every rank begins pieces of work in one order


@contextlib.contextmanager
def apart(ranks: Ranks) -> Iterator[str]:
    """A piece of work that each rank does in its own time; gives its name, for ``deal``.

    The block ends on every rank when it has ended on all, however long the slowest takes.  While it
    is in the block a rank beats; one that has fallen silent is named.  What a rank raises as
    MtopdError or OSError is raised on every rank.
    """
    name = f"apart/{next(_pieces)}"
    store, hearts = _store(name), _store(_HEARTS)
    stop = threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # the store's process has ended: so will this one
            while True:
                hearts.add(str(ranks.rank), 1)
                if stop.wait(BEAT_EVERY_S):
                    return

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        try:
            yield name
        except (MtopdError, OSError) as error:
            outcome: _Outcome[None] = _failure(error)
            host = f"rank {ranks.rank} on host {socket.gethostname()}: " * (ranks.world_size > 1)
            # The first that fails is told of.
            store.compare_set("error", "", f"{host}{outcome.error}")
        store.add("done", 1)
        _wait_for_all(store, hearts, ranks)
    finally:
        stop.set()
        heart.join()
    if store.check(["error"]):
        raise MtopdError(store.get("error").decode())


def deal(name: str, call: int) -> int:
    """The next number from 0 in the ``call``-th dealing of the piece of work ``name`` that no rank
    has had; a huge one once a rank has failed: nobody begins anything then.
    """
    store = _store(name)
    if store.check(["error"]):
        return _FAILED
    return int(store.add(f"deal/{call}", 1)) - 1


def _store(name: str) -> dist.Store:
    # Public functions reach the job's store only while they make it.
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())


def _wait_for_all(store: dist.Store, hearts: dist.Store, ranks: Ranks) -> None:
    """Until every rank is done.  Raises MtopdError when the next rank has fallen silent: each watches
    one other.
    """
    watched = (ranks.rank + 1) % ranks.world_size
    beats, heard, (wait, longest) = -1, time.monotonic(), _POLL_S
    while store.add("done", 0) < ranks.world_size:
        now = hearts.add(str(watched), 0)
        if now != beats:
            beats, heard = now, time.monotonic()
        elif time.monotonic() - heard > SILENCE_S:
            raise MtopdError(
                f"rank {watched} has given no sign of life for {SILENCE_S:.0f} seconds, and it is not "
                "through: its host is down, or stopped; look at it, then start the same command again"
            )
        time.sleep(wait)
        wait = min(2 * wait, longest)


def digest_of(*parts: object) -> bytes:
    """Bytes to compare plain values by; equal values have equal representations."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.digest()


def _attempt(look: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(look())
    except (MtopdError, OSError) as error:
        return _failure(error)


def _failure(error: MtopdError | OSError) -> _Outcome[T]:
    if isinstance(error, OSError) and error.filename:  # a file that this rank cannot see, say
        return _Outcome(None, f"{error.filename}: {error.strerror}")
    return _Outcome(None, str(error))


def _is_same(ranks: Ranks, compared: bytes) -> bool:
    """Whether all ranks call this with the same bytes: one all-reduce of two numbers."""
    number = (
        int.from_bytes(hashlib.sha256(compared).digest()[:8], "little") >> 2
    )  # -number fits too
    bounds = torch.tensor([number, -number], dtype=torch.int64, device=ranks.device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    largest, smallest = bounds[0].item(), -bounds[1].item()
    return largest == smallest


def _tell_differences(sights: Sequence[tuple[str, str, bool]], cure: str) -> str:
    """One line about the ranks (host, what it sees, whether that is an error) of which not all see
    the same: errors first, else the first that differs from rank 0.
    """
    (first_host, first, _) = sights[0]
    errors = [rank for rank, (*_, failed) in enumerate(sights) if failed]
    differing = errors or [rank for rank, (_, said, _) in enumerate(sights) if said != first]
    host, said, _ = sights[differing[0]]
    others = Counter(sights[rank][0] for rank in differing[1:])
    named = [f"{count} on host {name}" for name, count in others.most_common(3)]
    more = f" (and {sum(others.values())} more ranks: {', '.join(named)})" if others else ""
    who = f"rank {differing[0]} on host {host}{more}"
    if errors:
        return f"{who}: {said}"
    return f"{who} {said}, rank 0 on host {first_host} {first}: {cure}"
