"""The memory and cores of a host that a container or a Slurm job leaves to this process: Linux's control groups.

Versions 1 and 2: docs.kernel.org, admin-guide/cgroup-v1 and cgroup-v2, scheduler/sched-bwc. A file that is missing or
cannot be read limits nothing. root: of the file system; only tests pass another than /.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def available_memory(root: Path = ROOT) -> int:
    """Bytes that this process can still allocate; in a control group, including cached file pages that the kernel
    reclaims first: inactive ones, and active ones that no process maps. 4 GiB if the system does not tell."""
    names = {
        1: ("usage_in_bytes", "total_inactive_file", "total_active_file", "total_mapped_file"),
        2: ("current", "inactive_file", "active_file", "file_mapped"),
    }
    info = root / "proc/meminfo"
    lines = info.read_text().splitlines() if info.is_file() else []
    left = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")] or [4 * 2**30]
    for version, group in _groups("memory", root):
        usage, *pages = names[version]
        for limit in ("limit_in_bytes",) if version == 1 else ("max", "high"):  # above high a process is slowed down
            with contextlib.suppress(OSError, ValueError):
                most, used = (int((group / f"memory.{name}").read_text()) for name in (limit, usage))
                stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                idle, active, mapped = (int(stat.get(name, 0)) for name in pages)
                left.append(max(0, most - used + idle + max(0, active - mapped)))
    return min(left)


def num_cores(*, of_rank: bool = False, root: Path = ROOT) -> int:
    """The number of cores that this process may use at a time; of_rank: divided by the number of ranks on this node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for version, group in _groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):
            if version == 1:
                time, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            else:
                time, period = map(int, (group / "cpu.max").read_text().split())
            if time > 0:
                cores = min(cores, -(-time // period))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if of_rank else cores


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yields (version, folder) of this process's groups of a controller, and of all groups above them."""
    mine = root / "proc/self/cgroup"
    for line in mine.read_text().splitlines() if mine.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # in a container the path may be the host's, while the mount is the group itself; other folders lack the files
        group = root / "sys/fs/cgroup" / (controller if controllers else "") / path.lstrip("/")
        for folder in (group, *group.parents):
            yield 1 if controllers else 2, folder
