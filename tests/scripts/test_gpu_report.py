"""scripts/gpu_report.py on a CPU: what its report says, also when a check fails, an item raises or a section hangs."""

import json
import math
import os
import stat
import subprocess
import time
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from models.common import Runtime
from models.graphs import StepRunner
from scripts import gpu_report
from scripts.gpu_report import SECTIONS, ReportArgs
from scripts.report import record, right, speed, trained
from scripts.report.record import Item, Section, largest, run_items
from tests import tiny
from tests.stand_ins import Graph

ON_CPU = Runtime(torch.device("cpu"), torch.float32, False)


def here(script, *flags, seconds=0.0):
    """Runs in this process a script that the report would start as another one."""
    result = tiny.run(script, *flags)
    assert result.code == 0, result.stderr
    return result.stdout


@pytest.fixture
def section(tmp_path):
    return Section("right", ON_CPU, tmp_path / "rows.jsonl", time.time() + 100, time.time(), small=True)


def rows_of(section: Section) -> list[dict]:
    return tiny.read_lines(section.rows_file) if section.rows_file.exists() else []


@pytest.mark.parametrize("name", SECTIONS)
def test_dry_run(name, tmp_path, monkeypatch):
    """Catches an item that does not run, a check that fails on a CPU, figures that are not positive numbers, goals that
    are not checked, and rows that are missing in the report."""
    monkeypatch.setattr(trained, "start_together", lambda commands: [here(s, *f) for s, f in commands.values()])
    monkeypatch.setattr(trained, "finish_together", lambda processes, commands, seconds: None)
    monkeypatch.setattr(trained, "run_script", here)
    monkeypatch.setattr(speed, "run_script", here)
    monkeypatch.setattr("scripts.benchmark_common.ceilings", lambda device: (1e12, 1e10, torch.float32))
    late = time.time() + 1000  # on a busy machine a section's own time is not enough
    args = ReportArgs(output_dir=tmp_path, device="cpu", dry_run=True, section=name, deadline=late)
    gpu_report.main(args)
    gpu_report.write_report(args, gpu_report.header(dry_run=True), [name])
    report = json.loads((tmp_path / "report.json").read_text())
    rows, text = report["sections"][name], (tmp_path / "report.md").read_text()
    assert not [row for row in rows if row["kind"] == "error"], rows
    assert all(row["ok"] for row in rows if row["kind"] == "check") and not any(
        "skipped" in row["detail"] for row in rows
    )
    assert all(row["value"] > 0 for row in rows if row["kind"] == "figure")
    assert all(row["name"] in text for row in rows) and report["header"]["card"].startswith("cpu")
    wanted = {"right": 43, "ceilings": 2, "decode": 9, "sft": 1, "rl": 2, "peers": 3, "kernels": 8}
    assert len(rows) >= wanted[name]
    if name == "kernels":  # which operations take the time
        named = [row["detail"].count("%)") >= 8 for row in rows if "time by operation" in row["name"]]
        assert named == [True] * 4
    goals = {row["name"]: row["met"] for row in rows if row["kind"] == "figure" and row["goal"] is not None}
    assert (
        len(goals) == {"decode": 5, "sft": 1}.get(name, 0) and goals.get("decode tiny float32, 1 slot, MBU") is not True
    )


def wrong_in_bf16(function, *args, **options):
    """Calls the function; its result, or that of a function it returns, is a tenth too large for bf16 tensors."""
    found = function(*args, **options)
    if callable(found) and not isinstance(found, torch.Tensor):
        return partial(wrong_in_bf16, found)
    is_wrong = any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args)
    several = isinstance(found, tuple)
    return tuple(x * (1.1 if is_wrong else 1.0) for x in found) if several else found * (1.1 if is_wrong else 1.0)


@contextmanager
def forgetful(engine, level):
    """Empties an engine's cache, and lets the engine find prompts in it nevertheless."""
    yield
    for tensor in engine.rows.cache.tensors():
        tensor.zero_()


def test_faults_are_found(section, tmp_path, monkeypatch):
    """Catches checks that cannot fail: products with other weights, tokens that top-p leaves out, other greedy ids, a
    cache that has been released and is still read, a kernel that reads one key too many or does not write the new one,
    weights that were updated otherwise, metrics that differ, and NaN."""
    real, threshold = right.dequantize, right.top_p_threshold
    monkeypatch.setattr(right, "dequantize", lambda weight: real(weight) * 1.1)
    monkeypatch.setattr(right, "top_p_threshold", lambda logits, top_p: threshold(logits[:, :290], top_p))
    monkeypatch.setattr(right, "greedy_by_transformers", lambda model, prompts, n: [[1] * n for _ in prompts])
    faulty = (right.check_products, right.check_kernels, right.check_top_p, right.check_greedy)
    run_items(section, [Item(check.__name__, 0, check) for check in faulty])
    checks = [row for row in rows_of(section) if row["kind"] == "check"]
    assert len(checks) == 12 + 4 + 1 + 4 and not any(row["ok"] for row in checks)
    monkeypatch.setattr(right, "resting", forgetful)
    run_items(section, [Item("compiled", 0, right.check_compiled)])
    checks = [row for row in rows_of(section) if "--sleep" in row["name"]]
    assert len(checks) == 2 and not any(row["ok"] for row in checks)
    for name in ("causal_attention", "document_attention", "linear_cross_entropy", "linear_logprobs"):
        faulty = partial(wrong_in_bf16, getattr(right, name))
        monkeypatch.setattr(right, name, faulty)
    monkeypatch.setattr(right.optim, "gpu_kernel", lambda device: mock.Mock())  # updates nothing
    section.runtime, before = ON_CPU._replace(dtype=torch.bfloat16), len(rows_of(section))
    run_items(section, [Item("gradients", 0, right.check_gradients), Item("AdamW", 0, right.check_optimizer)])
    checks = rows_of(section)[before:]
    assert len(checks) == 6 + 2 and not any(row["ok"] for row in checks)

    def kernel(q, new_k, new_v, k, v, table, lengths, splits, short=0, writes=True):
        out = []
        for row, n in enumerate(lengths.tolist()):
            for cache, new in ((k, new_k), (v, new_v)) if writes else ():
                cache[table[row, (n - 1) // 64], (n - 1) % 64] = new[row]
            keys, values = (t[table[row].long()].flatten(0, 1)[: n - short].transpose(0, 1) for t in (k, v))
            out.append(right.F.scaled_dot_product_attention(q[row, :, None], keys, values, enable_gqa=True)[:, 0])
        return torch.stack(out)

    shape = {"device": ON_CPU.device, "dtype": torch.float32, "D": 16, "K": 2, "groups": 2, "splits": 1}
    assert right.attention_distance(kernel, **shape) < 1e-5
    for fault in ({"short": -1}, {"writes": False}):  # NaN beyond the end, and where the new key should be
        assert not right.attention_distance(partial(kernel, **fault), **shape) < 0.1
    for name, moved in (("start", 0.0), ("theirs", 1.0), ("ours", 1.1)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4,), moved)}, tmp_path / name / "model.safetensors")
        line = {"loss": 1 + moved, "time/update": moved, "grad_norm": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    folders = [tmp_path / name for name in ("ours", "theirs", "start")]
    assert trained.weights_distance(*folders) == pytest.approx(0.1)
    assert trained.metrics_distance(*folders[:2]) == pytest.approx(0.1 / 2.001)
    assert math.isnan(largest([0.1, math.nan, 0.2]))  # max gives 0.2
    section.check("NaN", float("nan"), 1.0)
    assert not rows_of(section)[-1]["ok"]


def test_failures_do_not_stop_it(section, monkeypatch):
    """Catches an item whose failure ends the others too, an item begun without enough time left, and a goal compared in
    the wrong direction."""

    def fail(section: Section) -> None:
        raise torch.OutOfMemoryError("first line\nCUDA out of memory")

    def measure(section: Section) -> None:
        section.figure("start-up", 31.0, "s", 30)
        section.figure("speed", 31.0, "tok/s", 30)

    section.small = False
    monkeypatch.setattr(record, "free_memory", fail)  # as after an illegal access
    run_items(section, [Item("fails", 1, fail), Item("long", 1000, fail), Item("goes on", 1, measure)])
    failed, skipped, startup, rate = rows_of(section)
    assert failed["kind"] == "error" and "CUDA out of memory" in failed["detail"]
    assert skipped["kind"] == "note" and skipped["detail"].startswith("skipped") and "1000" in skipped["detail"]
    assert not startup["met"] and rate["met"]


def test_all_sizes_are_captured():
    """Catches a size that a timed run captures, such as those of the last answers."""
    runner = StepRunner(lambda size: None, 100, [torch.zeros(1)], Graph)
    runner.prepare(4)
    speed.capture_all(types.SimpleNamespace(rows=types.SimpleNamespace(runner=runner)))
    assert sorted(runner.graphs) == runner.sizes and runner.seconds > 0


def test_sections_that_end_badly(tmp_path, monkeypatch):
    """Catches a report that is lost when a section dies or hangs, a section whose child processes outlive its time
    limit, and a section begun without enough time left."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n*"--section decode"*) sleep 98 & echo $! >"$0.pid"; sleep 99;;\n'
        '*"--section right"*) echo \'{"section": "right", "kind": "note", "name": "first", "detail": ""}\' '
        f">>{out}/rows.jsonl; echo boom >&2; exit 3;;\n*) cp {out}/report.md {out}/before.md;;\nesac\n"
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(gpu_report.sys, "executable", str(python))
    monkeypatch.setattr(gpu_report, "START", 1.5)  # of 6.5 seconds
    short = {name: plan._replace(seconds=1.2) for name, plan in SECTIONS.items()}
    monkeypatch.setattr(gpu_report, "SECTIONS", short)
    chosen = ["right", "ceilings", "decode", "sft"]
    gpu_report.main(ReportArgs(output_dir=out, device="cpu", sections=chosen, minutes=6.5 / 60))
    report, before = ((out / name).read_text() for name in ("report.md", "before.md"))
    sections = json.loads((out / "report.json").read_text())["sections"]
    states = {name: rows[-1]["state"] for name, rows in sections.items()}
    assert states["right"] == "failed with exit code 3" and sections["right"][-1]["detail"] == "boom"
    assert states["ceilings"] == "done" and states["decode"].startswith("ended after")
    assert states["sft"].startswith("skipped") and "2 failures" in report
    assert "first" in before and "boom" in before  # written after each section
    state = Path("/proc") / Path(f"{python}.pid").read_text().strip() / "stat"
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":  # a zombie that nobody reaps
            break
        time.sleep(0.02)
    else:
        pytest.fail("what a section had started goes on behind its end")


def test_shell(tmp_path):
    """Catches a gpu_report.sh that takes a Python without torch, installs one, does not find one whose path has spaces,
    or loses its arguments or $OUT; and a section's process that is not told its deadline."""
    for name, code in (("without", 1), ("with", 0), ("of a house", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {code}\necho "{name}" "$@"\n')
        (tmp_path / name).chmod(0o755)

    def shell(*pythons: str) -> subprocess.CompletedProcess:
        given = {"PYTHON": " ".join(str(tmp_path / name) for name in pythons), "OUT": "somewhere"}
        command = ["bash", str(tiny.ROOT / "scripts/gpu_report.sh"), "--minutes", "1"]
        return subprocess.run(command, env=os.environ | given, capture_output=True, text=True)

    assert shell("missing", "without", "with").stdout == (
        "with scripts/gpu_report.py --output_dir somewhere --minutes 1\n"
    )
    assert shell("of a house").stdout.startswith("of a house scripts/gpu_report.py")
    refused = shell("without")
    assert refused.returncode == 2 and "no python3 with torch" in refused.stderr and not refused.stdout
    with mock.patch.object(gpu_report, "run_section") as run:
        result = tiny.run("scripts/gpu_report.py", "--section", "right", "--started", 5.0, "--deadline", 9.5)
    assert result.code == 0 and run.call_args[0][0].deadline == 9.5


@pytest.mark.parametrize("flags", [(), ("--device", "cuda")])
def test_no_gpu(flags, tmp_path, monkeypatch):
    """Catches 8 minutes of 7B shapes on a CPU, and sections that fail one after the other for want of a GPU."""
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_report, "start_and_wait", mock.Mock(side_effect=AssertionError))
    out = tmp_path / "out"
    tiny.assert_refused(tiny.run("scripts/gpu_report.py", "--output_dir", out, *flags), "no GPU here", "--dry_run")
    assert not out.exists()
