"""A process that ends with the one that started it, however that one ends (Linux).

    python -P -m mtopd.child_process PARENT SIGNAL COMMAND...

becomes COMMAND, to which the kernel sends SIGNAL when the process PARENT, or its thread that started
this one, is gone.  The wish outlives the exec, so COMMAND may be any program.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send ``signum`` to this process when ``parent``, which started it, dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it died before the request was made
        os._exit(1)


def with_parent(command: Sequence[str], signum: int = signal.SIGKILL) -> list[str]:
    """The command line that runs ``command`` until the calling process ends."""
    hop = [sys.executable, "-P", "-m", "mtopd.child_process", str(os.getpid()), str(int(signum))]
    return [*hop, *command]


def main(arguments: Sequence[str]) -> None:
    parent, signum, *command = arguments
    die_with_parent(int(parent), int(signum))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
