"""Worker: prints by how many bytes this process grew at most while ``teachers add`` ran, after all
imports.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mtopd.convert.teacher import add_teacher


def peak_bytes() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def main(small: Path, large: Path, stores: Path) -> None:
    add_teacher("small", small, stores / "small", slices=2)  # imports and first-use allocations
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = peak_bytes()
    add_teacher("large", large, stores / "large", slices=2)
    print(peak_bytes() - before)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
