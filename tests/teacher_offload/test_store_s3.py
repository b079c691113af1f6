"""A store behind a URL, read from a real S3-protocol server: same bytes, same checks, errors
without secrets.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from mtopd.convert.teacher import add_teacher
from mtopd.teacher_offload.storage import open_storage
from mtopd.teacher_offload.store import (
    TeacherStore,
    check_files,
    open_store,
    read_blocks,
    read_range,
)
from mtopd.tokenizer import load_tokenizer, tokenizer_hash
from mtopd.types import MtopdError
from tests.conftest import REPOSITORY
from tests.small_models import save_model
from tests.teacher_offload.s3_server import BUCKET, S3Server, s3_server

URL = f"s3://{BUCKET}/stores/t"
LAYER = "layers/00001.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def local(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    root = tmp_path_factory.mktemp("local")
    save_model(root / "hf", seed=1, hidden=256, layers=3, tied=False)
    store = add_teacher("t", root / "hf", root / "t", slices=2)
    server.upload(root / "t", "stores/t")
    return store


@pytest.fixture(autouse=True)
def credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def test_a_remote_store_holds_the_same_bytes(local: TeacherStore) -> None:
    remote = open_store(URL)
    assert (
        remote.location == URL
        and remote.fingerprint == local.fingerprint
        and list(remote.files) == list(local.files)
    )
    for path, file in remote.files.items():
        there, count = read_range(file, 0, file.blocks[-1].stop)
        assert count == len(there)
        assert np.array_equal(there, read_range(local.files[path], 0, count)[0])


def test_the_tokenizer_comes_along(local: TeacherStore) -> None:
    for store in (local, open_store(URL)):
        with store.tokenizer_folder() as folder:
            assert tokenizer_hash(load_tokenizer(folder)) == store.manifest["tokenizer_hash"]
        assert not folder.exists()


def test_many_threads_read_at_once(local: TeacherStore) -> None:
    file = open_store(URL).files["embedding.safetensors"]

    def read(block: object) -> bytes:
        out = np.empty(block.stop - block.start, np.uint8)  # type: ignore[attr-defined]
        read_blocks(file, [block], out)  # type: ignore[list-item]
        return out.tobytes()

    with ThreadPoolExecutor(8) as pool:
        whole = b"".join(pool.map(read, file.blocks * 4))
    assert whole == Path(local.files["embedding.safetensors"].label).read_bytes() * 4


def test_verify_names_the_damaged_object(
    local: TeacherStore, server: S3Server, tmp_path: Path
) -> None:
    server.upload(Path(local.location), "stores/damaged")
    data = bytearray(Path(local.files[LAYER].label).read_bytes())
    data[-7] ^= 4
    server.client().put_object(Bucket=BUCKET, Key=f"stores/damaged/{LAYER}", Body=bytes(data))
    for name, code in (("t", 0), ("damaged", 2)):
        command = [
            sys.executable,
            "-m",
            "mtopd.pipelines.cli",
            "teachers",
            "verify",
            f"s3://{BUCKET}/stores/{name}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
        assert done.returncode == code, done.stderr
    assert (
        f"{BUCKET}/stores/damaged/{LAYER}: bytes" in done.stderr
        and "1 damaged blocks" in done.stderr
    )
    server.client().put_object(Bucket=BUCKET, Key=f"stores/damaged/{LAYER}", Body=bytes(data[:-1]))
    with pytest.raises(MtopdError, match=rf"damaged/{LAYER} has \d+ bytes"):
        check_files(open_store(f"s3://{BUCKET}/stores/damaged"))
    server.client().delete_object(Bucket=BUCKET, Key=f"stores/damaged/{LAYER}")
    with pytest.raises(MtopdError, match=f"lacks {LAYER}"):
        check_files(open_store(f"s3://{BUCKET}/stores/damaged"))


def refusal(url: str, *secrets: str) -> str:
    """The one line of the error of opening ``url``, which names it and none of the secrets."""
    with pytest.raises(MtopdError) as caught:
        open_store(url)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    assert not [secret for secret in secrets if secret in text]
    return text


def test_a_wrong_key_is_refused(
    local: TeacherStore, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    line = refusal(URL, "wrong-secret", server.key)
    assert (
        f"cannot read {URL}/teacher.json: access was denied (the server said SignatureDoesNotMatch)"
        in line
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWNKEY")
    assert "access was denied (the server said InvalidAccessKeyId)" in refusal(
        URL, "AKIAUNKNOWNKEY", "wrong-secret"
    )


def test_a_missing_bucket_or_store_is_named(local: TeacherStore) -> None:
    assert "cannot read s3://no-such/t/teacher.json: the bucket does not exist" in refusal(
        "s3://no-such/t"
    )
    assert f"there is no teacher store at s3://{BUCKET}/stores/u" in refusal(
        f"s3://{BUCKET}/stores/u"
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://AKIAKEY:hunter2@bucket/t", "credentials belong in"),
        ("s3://bucket/t?X-Amz-Signature=hunter2", "credentials belong in"),
        ("ftp://bucket/t", "no URL of an object store"),
        ("file:///tmp/t", "without file://"),
    ],
)
def test_what_is_no_plain_url_is_refused(url: str, said: str) -> None:
    assert said in refusal(url, "hunter2", "AKIAKEY")


@contextlib.contextmanager
def overloaded(port: int) -> Iterator[list[str]]:
    """A server on ``port`` that counts what it is asked for and answers 503, every time."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_server_that_does_not_serve_ends_in_an_error_after_bounded_retries(
    local: TeacherStore, monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    with s3_server() as other:
        for name, value in other.environment.items():
            monkeypatch.setenv(name, value)
        other.upload(Path(local.location), "stores/t")
        store = open_store(URL)
        other.stop()
        port = urlsplit(other.url).port
        assert port is not None
        with (
            contextlib.nullcontext() if is_gone else overloaded(port) as asked,
            pytest.raises(
                MtopdError, match=rf"cannot read {URL}/{LAYER}: the request failed.* 5 retries"
            ) as caught,
        ):
            read_range(store.files[LAYER], 0, 4096)
        assert asked is None or len(asked) == 6, "one request and five retries"
        assert other.key not in str(caught.value) and other.secret not in str(caught.value)


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MtopdError, match=r"pip install mtopd\[s3\]"):
        open_storage(URL)
