"""What compute-sanitizer's racecheck found, less what it always finds in kernels whose warps have different tasks.

    python scripts/sanitize_report.py racecheck.log

Where such a kernel begins, one group of its warps writes to shared memory which task the others have, all warps meet at
a barrier, the others read it, and all meet again; where it ends, likewise. racecheck (of CUDA 13.0) does not take these
barriers for what they are as soon as a group has barriers of its own, and reports the reads and writes as races: in any
kernel with `gl.warp_specialize`, at the lines of the kernel's `def` and of that call, where nothing else touches shared
memory. Such reports are counted apart. Every other one is printed, and the exit code is 1.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "gdn_cp"
ACCESS = re.compile(r"(?:Read|Write) access at (\w+)\+\S+(?: in (\S+?):(\d+))?")


@cache
def dispatch_lines(file: str, kernel: str) -> frozenset[int]:
    """Lines of a file of this package at which Triton tells warps their tasks: of `kernel` and its warp_specialize."""
    lines: set[int] = set()
    for path in KERNELS.rglob(Path(file).name):
        text = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(text, 1):
            if line.startswith(f"def {kernel}(") or line.strip() == "gl.warp_specialize(":
                lines.add(number)
    return frozenset(lines)


def split_reports(log: str) -> tuple[list[str], int]:
    """(reports of races, how many more there are of Triton's dispatch)."""
    races, dispatched = [], 0
    for report in re.split(r"(?=Race reported)", log)[1:]:
        accesses = ACCESS.findall(report)
        if accesses and all(file and int(line) in dispatch_lines(file, name) for name, file, line in accesses):
            dispatched += 1
        else:
            races.append(report.split("\n========= \n")[0].strip())
    return races, dispatched


def main(path: str) -> int:
    """Print both counts and every race; 1 if there is a race, if racecheck was cut off, or if what it watched failed,
    which its exit code does not tell from reports."""
    log = Path(path).read_text(encoding="utf-8", errors="replace")
    if "RACECHECK SUMMARY" not in log:
        print("racecheck was cut off:", log[-500:])
        return 1
    if "Target application returned an error" in log:
        print("what racecheck watched failed:", log[-500:])
        return 1
    races, dispatched = split_reports(log)
    print(f"{len(races)} races, {dispatched} reports of Triton's dispatch of warps")
    for race in races:
        print(race)
    return int(bool(races))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
