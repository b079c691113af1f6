"""A small program in a server's place, for what concerns processes and ports alone: it takes the command
line of one, says of itself what the flags say, and has a worker in its process group.

``write(path)`` makes an executable of it, as ``rollout.python`` would be.  Its own flag is --behave:
fails: ends before it listens; silent: never answers; deaf: ignores SIGTERM.  Every start adds a line to
``pids`` beside the executable: its pid, its worker's, its port.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PROGRAM = """#!{python} -IS
import argparse, http.server, json, os, signal, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("-m"), parser.add_argument("--host"), parser.add_argument("--port", type=int)
parser.add_argument("--behave"), parser.add_argument("--context-length", type=int)
given, rest = parser.parse_known_args()
worker = subprocess.Popen(["sleep", "300"])
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "pids"), "a") as file:
    file.write(f"{{os.getpid()}} {{worker.pid}} {{given.port}}\\n")
assert not any(name.startswith("TORCHELASTIC") for name in os.environ), "a rank's environment"
if given.behave == "fails":
    sys.exit("ModuleNotFoundError: No module named 'sglang'")
if given.behave == "silent":
    time.sleep(300)
if given.behave == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
flags = {{part[2:].replace("-", "_"): True for part in rest if part.startswith("--")}}
info = {{"version": "0.5.23", "max_req_input_len": given.context_length - 6, "tp_size": 1}} | flags
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers()
        self.wfile.write(json.dumps(info if self.path == "/server_info" else {{}}).encode())
    def log_message(self, *_): pass
http.server.HTTPServer((given.host, given.port), Handler).serve_forever()
"""


def write(path: Path) -> Path:
    path.write_text(_PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return path


def starts(program: Path) -> list[list[int]]:
    """[pid, worker's pid, port] of every start so far."""
    lines = path.read_text() if (path := program.with_name("pids")).exists() else ""
    return [[int(word) for word in line.split()] for line in lines.splitlines()]
