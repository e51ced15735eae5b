"""models/limits.py: the memory and cores that containers and Slurm jobs may use, from files as Linux documents them."""

import os
from pathlib import Path

import pytest
import torch

from models import common, limits
from models.common import RuntimeArgs, choose_runtime


@pytest.fixture
def group(tmp_path):
    """Writes files of a control group, whose path is relative to sys/fs/cgroup."""

    def write(path: str, **files: object) -> None:
        folder = tmp_path / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name.replace("__", ".")).write_text(f"{value}\n")

    return write


def process(root: Path, groups: str) -> Path:
    """Makes a root file system with a process in these groups, where 10**6 KiB are available."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/meminfo").write_text("MemTotal: 2000000 kB\nMemFree: 7 kB\nMemAvailable: 1000000 kB\n")
    return root


HOST = 1024 * 10**6
VERSION_1 = "9:cpu,cpuacct:/docker/abc\n8:cpuset:/cpus\n4:hugetlb,memory:/docker/abc\n1:name=systemd:/docker/abc\n"


def test_memory(tmp_path, group):
    """Catches slots planned by the host's memory where a container or a job has less, and is killed or throttled for
    more: both versions of control groups, a limit of the group itself or of one above it, a path that only the host
    knows."""

    def left(groups: str) -> int:
        return limits.available_memory(process(tmp_path, groups))

    assert limits.available_memory(tmp_path) == 4 * 2**30  # another system
    group("", memory__stat="inactive_file 9")  # the host's own group has no limit
    group("job:1/step", memory__max="max", memory__current=100, memory__stat="anon 7\ninactive_file 10")
    group("job:1", memory__max=1000, memory__current=300, memory__stat="inactive_file 50")
    assert left("0::/job:1/step\n") == 750
    group("job:1", memory__stat="inactive_file 40\nactive_file 35\nfile_mapped 25")  # a model's files, read twice
    assert left("0::/job:1/step\n") == 750
    group("job:1", memory__stat="inactive_file 50\nactive_file 35\nfile_mapped 36")
    assert left("0::/job:1/step\n") == 750
    assert left("0::/elsewhere\n") == left("0::/\n") == HOST
    group("job:1/step", memory__high=600)  # above which it would be slowed down until it gives memory back
    assert left("0::/job:1/step\n") == 510
    group("job:1/step", memory__high="max")
    assert left("0::/job:1/step\n") == 750
    group("job:1/step", memory__max=400, memory__current=500)
    assert left("0::/job:1/step\n") == 0
    group("", memory__max=600, memory__current=100)  # within a container, whose group is all there is
    assert left("0::/\n") == left("0::/../elsewhere\n") == 509
    lines = ("inactive_file 1", "total_inactive_file 60", "total_active_file 50", "total_mapped_file 10")
    stat = {"memory__stat": "\n".join(lines)}
    group("memory/docker/abc", memory__limit_in_bytes=2000, memory__usage_in_bytes=700, **stat)
    group("memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=900, **stat)
    assert left(VERSION_1) == 1400
    assert left(VERSION_1.replace("abc", "of the host")) == HOST
    (tmp_path / "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes").unlink()
    assert left(VERSION_1) == HOST


def test_cores(tmp_path, group, monkeypatch):
    """Catches a thread or a worker process for each core of the host in a container that may use two of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def cores(groups: str, **options) -> int:
        return limits.num_cores(root=process(tmp_path, groups), **options)

    assert limits.num_cores(root=tmp_path) == cores("0::/job\n") == 64
    group("job/step", cpu__max="max 100000")
    assert cores("0::/job/step\n") == 64
    group("job", cpu__max="250000 100000")
    assert cores("0::/job/step\n") == 3
    group("cpu/cpus", cpu__cfs_quota_us=100000, cpu__cfs_period_us=100000)  # of another group
    group("cpu/docker/abc", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert cores(VERSION_1) == 64
    group("cpu/docker/abc", cpu__cfs_quota_us=1600000, cpu__cfs_period_us=100000)
    assert cores(VERSION_1) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert cores(VERSION_1) == 16 and cores(VERSION_1, of_rank=True) == 2
    assert cores("0::/job\n", of_rank=True) == 1


def test_threads(monkeypatch):
    """Catches more threads than cores, a user's number of threads changed, and more threads than torch would take."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    choose_runtime(RuntimeArgs(device="cpu"))
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    for cores, threads in ((2, 2), (64, 8)):
        monkeypatch.setattr(common, "num_cores", lambda cores=cores: cores)
        choose_runtime(RuntimeArgs(device="cpu"))
        assert chosen.pop() == threads
