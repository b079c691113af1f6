"""A real S3-protocol server (moto's, in a process of its own, with IAM on) and a user who may read
one bucket.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "teachers"
_REGION = "us-east-1"
_SETUP_ACTIONS = 1_000_000  # before the switch below nobody's signature is checked


@dataclass(frozen=True)
class S3Server:
    process: subprocess.Popen[str]
    url: str
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """What a user of the server sets."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": _REGION,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }

    def client(self) -> Any:
        return _client("s3", self.url, self.key, self.secret)

    def upload(self, folder: Path, prefix: str) -> None:
        client = self.client()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(
                    str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}"
                )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": str(_SETUP_ACTIONS)}
    # Port 0: any that is free.
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr)
        url = next(
            found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line))
        )
        threading.Thread(
            target=lambda: [None for _ in lines], daemon=True
        ).start()  # its log must not fill the pipe
        iam = _client("iam", url, "setup", "setup")
        iam.create_user(UserName="reader")
        allow = {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
        }
        iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=json.dumps(allow))
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        server = S3Server(process, url, key["AccessKeyId"], key["SecretAccessKey"])
        server.client().create_bucket(Bucket=BUCKET)
        check = urllib.request.Request(
            f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(check, timeout=10).read()  # from now on every signature is checked
        yield server
    finally:
        process.kill()
        process.wait()


def _client(service: str, url: str, key: str, secret: str) -> Any:
    import boto3

    return boto3.client(
        service,
        endpoint_url=url,
        region_name=_REGION,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
    )
