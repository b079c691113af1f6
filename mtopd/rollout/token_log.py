"""The token log of a rollout: every sampled token is on disk within a tenth of a second, so that a
killed rollout goes on where it was.

``iterations/N/rollout/log-<start>-<rank>.bin``, one writer a file, append only; of start 0, before all
others, is what the iteration before has left open (``carry_over``):

    record    length u32, crc32c u32 of the payload, payload
    payload   sample u64, start u32, version u32, count u16, finish u8, attempt u8,
              ids i32[count], log-probs f32[count]        (all little-endian)

``sample`` is a sample's id and, in the upper 32 bits, which turn of its response (from 0).  ``start``
is the place of the first token in its turn, ``version`` the iteration whose weights sampled the
tokens, ``finish`` 0 (it goes on), 1 (stop) or 2 (length).  A record with ``finish`` 3 holds no token,
but JSON behind its head: what an environment replied to that turn (``turns.Reply``).  The first record
has sample 2^64 - 1 and JSON behind its head: format, run, engine, and ``versions``, number -> name; a
later one of the kind adds names.

Promises:

- Records are committed (one write, one fdatasync) on a clock, never because a response has ended:
  else short responses would outlive more kills than long ones.  A response is handed on after its
  last record was committed.
- A torn tail costs its own record and what stands behind it, nothing before it.
- What several files hold of a token, or a reply, is equal, or the logs are refused: two starts drew a
  token apart.
- Reading takes time linear in records, and handles tokens as bytes.  Ranks look through the logs of
  former starts by shares; the tokens of a response are read where it goes on.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from mtopd.files import explain, fsync_dir, write_atomic
from mtopd.rollout.memory_log import Held, MemoryLog, Named, OpenResponse, Record, sample_of
from mtopd.types import MtopdError

COMMIT_EVERY_S = 0.1
FORMAT = 2  # 2: turns and replies
_READ = (1, FORMAT)
_FRAME = struct.Struct("<II")  # length, crc32c
_HEAD = struct.Struct("<QIIHBB")  # sample, start, version, count, finish, attempt
_HEADER_SAMPLE = (1 << 64) - 1
_MAX_COUNT = (1 << 16) - 1
_FINISH_CODES = {None: 0, "stop": 1, "length": 2}
_FINISH_REASONS = {code: reason for reason, code in _FINISH_CODES.items()}
_REPLY = 3


def log_path(folder: Path, generation: int, rank: int) -> Path:
    return folder / f"log-{generation:06d}-{rank:05d}.bin"


# -- writing -------------------------------------------------------------------------------------
class TokenLog(MemoryLog):
    """The log of this rank in this start; ``former``: what the starts before it have left."""

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        run: str,
        engine: str,
        versions: dict[int, str],
        former: FormerLogs | None = None,
    ) -> None:
        super().__init__(name)
        self.path = path
        self.num_bytes = 0  # committed
        self.num_commits = 0
        self._former = former or FormerLogs({}, run)
        self._pending: deque[Record] = deque()  # whoever appends, and the clock's thread
        self._error: MtopdError | None = None
        self._committing = threading.Lock()  # one commit at a time, records in order
        self._stop = threading.Event()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Exclusively: a file has one writer, ever.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._about = {"format": FORMAT, "run": run, "engine": engine}
        self._versions: dict[int, str] = {}
        self.note_versions(versions)
        fsync_dir(path.parent)
        self._clock = threading.Thread(target=self._commit_on_the_clock, daemon=True)
        self._clock.start()

    def note_versions(self, versions: Mapping[int, str]) -> None:
        """Name the students whose tokens follow, as far as they have no name here yet."""
        if versions.items() <= self._versions.items():
            return
        self._versions |= versions
        named = {str(number): version for number, version in self._versions.items()}
        with self._committing:
            self._write(_header({**self._about, "versions": named}))

    def flush(self) -> None:
        self._commit()
        self._raise_error()

    def close(self) -> None:
        """Commit, and end the file."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._clock.join()
        try:
            self.flush()
        finally:
            os.close(self._file)

    def begin(self, requests: Iterable[Named]) -> list[Held]:
        asked = list(requests)
        self._former.read(request.sample_id for request in asked)  # before the lock: commits go on
        return super().begin(asked)

    def _recovered(self, sample_id: int) -> OpenResponse:
        return self._former.responses.pop(sample_id, None) or OpenResponse()

    def _recovered_reply(self, sample_id: int) -> bytes | None:
        return self._former.replies.pop(sample_id, None)

    def _note(self, record: Record) -> None:
        self._raise_error()
        self._pending.append(record)

    def take(self) -> list[Any]:
        self._raise_error()
        return super().take()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _commit_on_the_clock(self) -> None:
        while not self._stop.wait(COMMIT_EVERY_S):
            self._commit()

    def _commit(self) -> None:
        """Make pending records durable, then hand on the responses that they ended."""
        with self._committing:
            pending = [self._pending.popleft() for _ in range(len(self._pending))]
            if not pending or self._error is not None:
                return
            try:
                self._write(b"".join(_framed(payload) for payload in _payloads(pending)))
            except OSError as error:
                with self._changed:
                    self._error = MtopdError(
                        f"the token log cannot be written: {explain(error)}.  Nothing more is "
                        "sampled; the next start goes on with what was logged before"
                    )
                    self._changed.notify_all()
                return
            self.num_commits += 1
            with self._changed:
                for record in pending:
                    if record.finish_reason is not None:
                        self._hand_on(record.sample_id)

    def _write(self, data: bytes) -> None:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fdatasync(self._file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.num_bytes += len(data)


def _header(about: Mapping[str, Any]) -> bytes:
    head = _HEAD.pack(_HEADER_SAMPLE, 0, 0, 0, 0, 0)
    return _framed(head + json.dumps(about, sort_keys=True).encode())


def _framed(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), google_crc32c.value(payload)) + payload


def _payloads(records: list[Record]) -> Iterator[bytes]:
    """Records of a response that follow one another are written as one."""
    by_sample: dict[int, list[Record]] = {}
    for record in records:
        by_sample.setdefault(record.sample_id, []).append(record)
    for of_sample in by_sample.values():
        run: list[Record] = []
        count = 0
        for record in of_sample:
            size = len(record.ids) // 4
            assert size <= _MAX_COUNT, f"{size} tokens at once"
            if run and (
                count + size > _MAX_COUNT
                or record.reply
                or record.version != run[0].version
                or record.attempt != run[0].attempt
            ):
                yield _payload(run, count)
                run, count = [], 0
            run.append(record)
            count += size
        yield _payload(run, count)


def _payload(run: list[Record], count: int) -> bytes:
    first = run[0]
    code = _REPLY if first.reply else _FINISH_CODES[run[-1].finish_reason]
    head = _HEAD.pack(first.sample_id, first.start, first.version, count, code, first.attempt)
    return b"".join([head, *(r.ids for r in run), *(r.log_probs for r in run), first.reply])


# -- reading -------------------------------------------------------------------------------------
@dataclass
class LogFile:
    """What a file holds, up to its torn tail."""

    path: Path
    about: dict[str, Any] = field(default_factory=dict)  # the first record; empty: it is torn too
    records: list[Record] = field(default_factory=list)
    num_torn: int = 0  # bytes behind them


def read_log(path: Path) -> LogFile:
    """The whole records of a file.  Raises MtopdError for a log of another format."""
    with open(path, "rb") as file:
        data = file.read()
        # What is gone on from must not be lost after what is logged behind it.
        os.fsync(file.fileno())
    log = LogFile(path)
    at, view = 0, memoryview(data)
    while at + _FRAME.size + _HEAD.size <= len(data):
        length, crc = _FRAME.unpack_from(data, at)
        payload = view[at + _FRAME.size : at + _FRAME.size + length]
        if length < _HEAD.size or len(payload) < length:
            break
        if google_crc32c.value(bytes(payload)) != crc:
            break
        sample_id, start, version, count, finish, attempt = _HEAD.unpack_from(payload)
        body = payload[_HEAD.size :]
        if sample_id == _HEADER_SAMPLE:
            _take_header(log, bytes(body))
        elif finish == _REPLY:
            log.records.append(Record(sample_id, 0, 0, b"", b"", None, attempt, bytes(body)))
        else:
            if len(body) != 8 * count or not log.about:
                raise MtopdError(f"{path} is no token log of format {FORMAT}; remove it")
            ids, log_probs = bytes(body[: 4 * count]), bytes(body[4 * count :])
            reason = _FINISH_REASONS[finish]
            log.records.append(Record(sample_id, start, version, ids, log_probs, reason, attempt))
        at += _FRAME.size + length
    log.num_torn = len(data) - at
    return log


def _take_header(log: LogFile, text: bytes) -> None:
    about = json.loads(text)
    if about.get("format") not in _READ:
        raise MtopdError(
            f"{log.path} is a token log of format {about.get('format')!r}, this version of mtopd "
            f"reads {' and '.join(map(str, _READ))}: go on with the version that wrote it, or remove "
            "it: what it holds is sampled again"
        )
    versions = {**log.about.get("versions", {}), **about["versions"]}
    log.about = {**about, "versions": versions}


@dataclass
class Recovery:
    """What former starts of an iteration had logged, by turn."""

    responses: dict[int, OpenResponse] = field(default_factory=dict)
    replies: dict[int, bytes] = field(default_factory=dict)
    num_dropped: int = 0  # tokens behind a gap
    versions: dict[str, str] = field(default_factory=dict)  # names of the students


def logs_before(folder: Path, generation: int) -> list[Path]:
    """Log files of starts before this one, the oldest first."""
    return sorted(p for p in folder.glob("log-*.bin") if _generation(p) < generation)


def _generation(path: Path) -> int:
    return int(path.name.split("-")[1])


def recover(paths: list[Path], *, run: str, unsealed: Container[int]) -> Recovery:
    """Join what the files hold of responses that are in no sealed shard.  Raises MtopdError where
    they hold different tokens, or belong to another run.
    """
    return _recover(paths, run, unsealed.__contains__)


def _recover(paths: list[Path], run: str, is_wanted: Callable[[int], bool]) -> Recovery:
    """Of the turns that ``is_wanted``."""
    found = Recovery()
    origin: dict[int, Path] = {}  # the last file that a response was in
    for path in paths:
        log = _log_of_run(path, run)
        found.versions = {**log.about.get("versions", {}), **found.versions}
        for record in log.records:
            if is_wanted(record.sample_id):
                _join(found, record, path, origin)
    return found


def _log_of_run(path: Path, run: str) -> LogFile:
    log = read_log(path)
    if log.about and log.about["run"] != run:
        raise MtopdError(
            f"{path} belongs to another run ({log.about['run']}, this is {run}); remove it"
        )
    return log


def samples_in(path: Path, *, run: str, unsealed: Container[int]) -> tuple[list[int], int]:
    """Which turns of samples that are in no sealed shard a file holds something of, and the bytes of
    its torn tail.
    """
    log = _log_of_run(path, run)
    held = {record.sample_id for record in log.records if sample_of(record.sample_id) in unsealed}
    return sorted(held), log.num_torn


class FormerLogs:
    """What former starts had logged, read by the rank that goes on with it, when it does.

    ``files``: the samples that each holds (``samples_in``).
    """

    def __init__(self, files: Mapping[Path, Iterable[int]], run: str) -> None:
        self.responses: dict[int, OpenResponse] = {}  # read, and not taken over yet
        self.replies: dict[int, bytes] = {}  # likewise
        self.num_dropped = 0  # tokens behind a gap, of those read
        self._run = run
        self._paths_of: dict[int, set[Path]] = {}  # of responses that were not read yet
        for path, sample_ids in files.items():
            for sample_id in sample_ids:
                self._paths_of.setdefault(sample_id, set()).add(path)

    def read(self, sample_ids: Iterable[int]) -> None:
        """Have ``responses`` of these, and of others that the same files hold whole."""
        paths: set[Path] = set().union(*(self._paths_of.get(i, ()) for i in sample_ids))
        if not paths:
            return
        whole = {i for i, held_by in self._paths_of.items() if held_by <= paths}
        found = recover(sorted(paths), run=self._run, unsealed=whole)  # the oldest first
        self.responses |= found.responses
        self.replies |= found.replies
        self.num_dropped += found.num_dropped
        for sample_id in whole:
            del self._paths_of[sample_id]


def _join(found: Recovery, record: Record, path: Path, origin: dict[int, Path]) -> None:
    if record.reply:
        if found.replies.setdefault(record.sample_id, record.reply) != record.reply:
            raise _apart(record, origin.get(record.sample_id, path), path)
        return
    response = found.responses.get(record.sample_id)
    if response is None:
        response = found.responses[record.sample_id] = OpenResponse()
    count = len(record.ids) // 4
    if record.start > response.length:
        found.num_dropped += count  # what stood before it was torn; it is drawn again
        return
    known = response.length - record.start  # tokens that are there already
    overlap = min(known, count)
    before = bytes(response.ids[4 * record.start : 4 * (record.start + overlap)])
    is_over = response.finish_reason is not None
    ends_apart = is_over and (
        count > known or (record.finish_reason is not None and count != known)
    )
    ends_early = record.finish_reason is not None and count < known
    if before != record.ids[: 4 * overlap] or ends_apart or ends_early:
        raise _apart(record, origin[record.sample_id], path)
    new = slice(4 * overlap, None)
    response.extend(record.ids[new], record.log_probs[new], count - overlap, record.version)
    response.finish_reason = record.finish_reason or response.finish_reason
    origin[record.sample_id] = path


def _apart(record: Record, first: Path, second: Path) -> MtopdError:
    what = f"different tokens of sample {sample_of(record.sample_id)} from token {record.start} on"
    if record.reply:
        what = f"two replies to sample {sample_of(record.sample_id)}"
    return MtopdError(
        f"{first} and {second} hold {what}: two starts have sampled it apart, and either may have been "
        "trained on; remove the logs of this iteration and its trajectories, then start again"
    )


# -- from one iteration to the next --------------------------------------------------------------
def carry_over(
    paths: list[Path], target: Path, *, run: str, engine: str, samples: Container[int]
) -> Counter[int]:
    """Write what the files hold of ``samples``, turns and replies, as one file in ``target``'s place;
    returns how many tokens it has of each.
    """
    found = _recover(paths, run, lambda turn: sample_of(turn) in samples)
    about = {"format": FORMAT, "run": run, "engine": engine, "versions": found.versions}
    records = [
        *itertools.chain.from_iterable(_records(*item) for item in found.responses.items()),
        *(Record(turn, 0, 0, b"", b"", None, 0, reply) for turn, reply in found.replies.items()),
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, b"".join([_header(about), *map(_framed, _payloads(records))]))
    tokens: Counter[int] = Counter()
    for turn, response in found.responses.items():
        tokens[sample_of(turn)] += response.length
    return tokens


def _records(turn: int, response: OpenResponse) -> Iterator[Record]:
    """What a log would hold of a response, a record for the tokens of each student."""
    ends = [*(start for start, _ in response.spans[1:]), response.length]
    for (first, version), end in zip(response.spans, ends, strict=True):
        for start in range(first, end, _MAX_COUNT):
            stop = min(start + _MAX_COUNT, end)
            reason = response.finish_reason if stop == response.length else None
            at = slice(4 * start, 4 * stop)
            ids, log_probs = bytes(response.ids[at]), bytes(response.log_probs[at])
            yield Record(turn, start, version, ids, log_probs, reason, 0)
