"""models/workers.py: whatever a grading function does, it costs one answer, and no process is left behind."""

import contextlib
import gc
import math
import os
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from models.functions import call_batch, load_grader, undisturbed
from models.workers import GradingArgs, Pool, _Dispatcher, _Worker
from tests import tiny

EVIL = """
import asyncio, ctypes, math, os, signal, subprocess, sys, time

def start():
    subprocess.Popen(["sleep", "1000.25"], start_new_session=True)

def hang(): time.sleep(1000)
def spin():
    while True: pass
def deaf():
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP): signal.signal(number, signal.SIG_IGN)
    hang()
def fork_and_hang(): os.fork(); hang()
def leave_a_child():
    if os.fork() == 0: hang()
    return 1
def come_back_twice():
    if os.fork(): time.sleep(0.1)
    return 1
def leave_a_daemon(): start(); return 1
def hang_beside_a_daemon(): start(); hang()
def leave_the_group(): os.setsid(); hang()
def kill_the_supervisor(): os.kill(os.getppid(), signal.SIGKILL); hang()
def stop(): os.kill(os.getpid(), signal.SIGSTOP)
def shout(): print("x" * 5000); sys.stdout.flush(); os.write(1, b"{}"); return 1
def leave(): sys.exit(0)
def leave_at_once(): os._exit(0)
def fail(): raise KeyError("mine")
def nan(): return math.nan
def infinite(): return 10**400
def digits(): return "1"
def nothing(): return None
def crash(): ctypes.string_at(0)
def eat():
    kept = []
    while True: kept.append(bytearray(2**24))
def recurse(): return recurse()
def close_all(): os.closerange(3, 4096); return 1
def write_everywhere():
    for number in range(3, 4096):
        try: os.write(number, b"[]\\n")
        except OSError: pass
    return 1
def alarm(): signal.setitimer(signal.ITIMER_REAL, 0.02); return 1
def truth(): time.sleep(0.1); return True

def evil(prompt, completion, example):
    return globals()[completion]()

def length(prompt, completion, example):
    if completion == "alarm": time.sleep(0.1)
    return len(prompt) + 10 * len(completion) + 100 * example["n"]

under_way = 0

async def judge(prompt, completion, example):
    global under_way
    under_way += 1
    await asyncio.sleep(0.05)
    if completion in globals(): globals()[completion]()
    if completion == "slow": await asyncio.sleep(1000)
    if completion == "later": await asyncio.sleep(0.5)
    if completion == "hold":
        held = bytes(200_000_000)  # not touched, which would take its time
        await asyncio.sleep(0.05)
    if completion == "start_in_a_thread": await asyncio.to_thread(start)
    if completion == "thread": await asyncio.to_thread(time.sleep, 0.3)
    if completion == "program": await (await asyncio.create_subprocess_exec("sleep", "1000.25")).wait()
    if completion == "stubborn":
        while True:
            try: await asyncio.sleep(1000)
            except asyncio.CancelledError: pass
    return under_way

gate = asyncio.Semaphore(1)

async def batch(prompts, completions, examples):
    async def pass_it():
        async with gate: await asyncio.sleep(0)
    await asyncio.gather(pass_it(), pass_it())
    return [len(c) for c in completions]

def loops(prompt, completion, example):
    return asyncio.run(judge(prompt, completion, example))

def decorated(prompt, completion, example):
    return judge(prompt, completion, example)
"""
OUTCOMES = {  # of the functions above: the value, or what the failure says
    "hang": "timeout",
    "spin": "timeout",
    "deaf": "timeout",
    "fork_and_hang": "timeout",
    "leave_a_child": 1,
    "come_back_twice": 1,
    "leave_a_daemon": 1,
    "hang_beside_a_daemon": "timeout",
    "leave_the_group": "timeout",
    "kill_the_supervisor": "process",
    "stop": "timeout",
    "shout": 1,
    "leave": "SystemExit: 0",
    "leave_at_once": "process ended, exit code 0",
    "fail": "KeyError: 'mine'",
    "nan": "returned nan",
    "infinite": "OverflowError",
    "digits": "returned a str",
    "nothing": "TypeError",
    "crash": "died of signal 11",
    "eat": "MemoryError",
    "recurse": "RecursionError",
    "close_all": "process",
    "write_everywhere": "where grades are expected",
    "alarm": 1,
    "truth": 1,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("graders") / "evil.py"
    path.write_text(EVIL)
    return path


def pool_of(file, *names, **more):
    given = {"reward_timeout": 0.4, "reward_workers": 2, "reward_memory": 0.2, **more}
    return Pool([load_grader("--reward_fn", f"{file}:{name}") for name in names], GradingArgs(**given))


@pytest.fixture
def mark(monkeypatch):
    """A mark in the environment of all processes that this test starts, and of those that they start."""
    monkeypatch.setenv("STARTED_BY", f"test {os.getpid()} {time.monotonic_ns()}")
    return f"STARTED_BY={os.environ['STARTED_BY']}".encode()


def processes(mark):
    """The command lines of the processes with this mark; a zombie has none any more."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/environ", "rb") as environment, open(f"/proc/{entry}/cmdline") as command:
                if mark in environment.read():
                    found.append(command.read().replace("\0", " "))
        except OSError:  # it has ended meanwhile
            continue
    return found


def gone(mark):
    """Waits for these processes to end."""
    deadline = time.monotonic() + 20
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    return processes(mark) == []


def outcome(grade):
    return grade.value if grade.failure is None else grade.failure


def test_each_costs_one_answer(file, mark, capfd):
    """Catches a function that costs another answer its grade, ends or stops the run, writes into the pipe of grades,
    gets a grade for a result that is no number, or leaves a process behind."""
    gc.collect()  # files of earlier tests, which would be closed meanwhile
    num_open = len(os.listdir("/proc/self/fd"))
    pool = pool_of(file, "evil", "length", reward_timeout=1.5)
    futures = {}
    for name in OUTCOMES:  # each between two good ones
        futures[name] = pool.submit(0, "p", name, {}), pool.submit(1, "pp", name, {"n": 3})
    for name, (evil, good) in futures.items():
        wanted, got = OUTCOMES[name], outcome(evil.result())
        assert (got == wanted) if wanted == 1 else (isinstance(got, str) and wanted in got), (name, got)
        assert outcome(good.result()) == 2 + 10 * len(name) + 300, name
    assert len(processes(mark)) >= 2 and capfd.readouterr().out == ""  # what functions print is not our output
    pool.close()
    assert gone(mark) and len(os.listdir("/proc/self/fd")) == num_open  # also those of replaced processes
    assert pool.submit(0, "p", "hang", {}).cancelled()


def test_async_functions_run_side_by_side(file):
    """Catches async answers that wait for one another, a late answer that takes the others with it, an answer that
    blocks the loop or ends the process and is not told from those beside it, and asyncio.run that fails in a plain
    function."""
    pool = pool_of(file, "judge", "loops", reward_workers=1, reward_memory=1)
    futures = {n: pool.submit(0, "p", n, {}) for n in ("a", "slow", "stubborn", "leave", "fail", "b")}
    got = {name: outcome(future.result()) for name, future in futures.items()}
    assert got == {"a": 6, "slow": "timeout", "stubborn": "timeout", "leave": "SystemExit: 0", "b": 6} | {
        "fail": "KeyError: 'mine'"
    }
    futures = {n: pool.submit(0, "p", n, {}) for n in ("a", "hang", "b", "leave_at_once")}
    got = {name: outcome(future.result()) for name, future in futures.items()}
    assert got["hang"] == "timeout" and got["leave_at_once"] == "its process ended, exit code 0"
    assert isinstance(got["a"], float) and isinstance(got["b"], float)
    assert isinstance(outcome(pool.submit(1, "p", "a", {}).result()), float)
    pool.close()


def test_what_async_functions_start(file, mark, monkeypatch):
    """Catches answers that wait for a thread until they are late, programs that hang for a whole deadline one after the
    other, a program that outlives its answer, also while others are graded without a pause, an answer that loses its
    grade to one beside it that takes all memory, or to all those that do not fit beside it, and an async function not
    seen to be one."""
    starts, start = [], _Worker.start
    monkeypatch.setattr(_Worker, "start", lambda self, settings: (starts.append(self), start(self, settings)))
    with contextlib.closing(
        pool_of(file, "judge", "decorated", reward_workers=1, reward_memory=1, reward_timeout=2)
    ) as pool:
        futures = [pool.submit(0, "p", "thread", {}) for _ in range(60)]
        assert all(future.result().failure is None for future in futures)
        for *hanging, fine in (("program", "program", "program", "later"), ("eat", "later")):
            futures = [pool.submit(0, "p", name, {}) for name in (*hanging, fine)]
            *others, last = [outcome(future.result()) for future in futures]
            assert not any(isinstance(each, float) for each in others) and isinstance(last, float)
            assert pool.submit(1, "p", "a", {}).result().failure is None
            assert len(starts) == 2 or "eat" in hanging  # a process has taken the place of the one with programs
        futures = [pool.submit(0, "p", "hold", {}) for _ in range(10)]
        assert sum(isinstance(outcome(future.result()), str) for future in futures) == 1
        before = len(starts)
        futures = [pool.submit(0, "p", name, {}) for name in ("start", *["a"] * 300)]
        assert futures[250].result().failure is None and len(starts) == before + 1  # not only when the last has ended
        assert pool.submit(0, "p", "start_in_a_thread", {}).result().failure is None
        deadline = time.monotonic() + 20
        while any("sleep 1000.25" in line for line in processes(mark)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any("sleep 1000.25" in line for line in processes(mark))


def test_forms(file, tmp_path, monkeypatch):
    """Catches a form (batch or single answer) guessed from the number of parameters, an async batch that is not
    awaited, and code that does not know where its file is once a function has changed the directory."""
    (tmp_path / "f.py").write_text(
        "def two(prompt, completion): return 1\n"
        "def other(p, c, e): return 1\n"
        "def mixed(prompts, completion, example): return 1\n"
        "def more(prompt, completion, example, strict): return 1\n"
        "def turned(examples, completions, prompts, scale=2): return [scale * len(p) for p in prompts]\n"
    )
    for name in ("two", "other", "mixed", "more"):
        with pytest.raises(
            ValueError, match=r"must take \(prompts, completions, examples\).* or \(prompt, completion, ex"
        ):
            load_grader("--reward_fn", f"{tmp_path / 'f.py'}:{name}")
    assert call_batch(load_grader("--reward_fn", f"{tmp_path / 'f.py'}:turned"), ["abc"], ["d"], [{}]) == [(6, None)]
    batch = load_grader("--reward_fn", f"{file}:batch")
    for _ in range(2):  # what it awaits belongs to one event loop
        assert call_batch(batch, ["a"], ["bcd"], [{}]) == [(3, None)]
    monkeypatch.chdir(tmp_path)
    assert load_grader("--reward_fn", "f.py:turned").function.__code__.co_filename == str(tmp_path / "f.py")
    graders = [load_grader("--reward_fn", f"{file}:{name}") for name in ("judge", "batch", "evil")]
    assert [(g.per_answer, g.is_async) for g in graders] == [(True, True), (False, True), (True, False)]


def test_processes_started_anew(tmp_path, monkeypatch):
    """Catches a file's functions that a process of multiprocessing does not find where it is not forked, as on macOS
    and by default since Python 3.14: its pool waits without end, and a check in a process of its own never succeeds."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_checks.py").write_text(
        "import multiprocessing\n"
        "def check(text): return float(text == 'right')\n"
        "def batch(prompts, completions, examples):\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        return pool.map_async(check, completions).get(60)\n"
    )
    grader = load_grader("--reward_fn", f"{tmp_path}/own_checks.py:batch")
    assert call_batch(grader, ["p"] * 2, ["right", "wrong"], [{}] * 2) == [(1, None), (0, None)]


def test_an_alarm_ends_with_its_call(tmp_path):
    """Catches an alarm that a batch function, or its file, leaves pending and that is raised in the run, a timer of the
    run itself that it takes away or sets back, and a handler that the file set for its alarms lost."""
    code = "import signal, time\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.alarm(9)\n\n\n"
    code += "def f(prompts, completions, examples): signal.alarm(9); time.sleep(0.01); return [1]\n"
    (tmp_path / "f.py").write_text(code)
    before = signal.getsignal(signal.SIGALRM)
    try:
        for own in ((0.0, 0.0), (99.0, 7.0)):
            signal.setitimer(signal.ITIMER_REAL, *own)
            grader = undisturbed()(load_grader)("--reward_fn", f"{tmp_path / 'f.py'}:f")
            assert call_batch(grader, ["a"], ["b"], [{}]) == [(1, None)]
            left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
            assert (left, interval) == own if not own[0] else 20 < left <= 98.99 and interval == 7
            assert signal.getsignal(signal.SIGALRM) != before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_functions_that_take_another_gpu(monkeypatch):
    """Catches a run that goes on, on the GPU that a reward function has made the current one."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with undisturbed():
        torch.cuda.set_device(1)
    assert current == [0, 1, 0]


def test_a_file_that_is_edited_meanwhile(tmp_path):
    """Catches answers graded by what the file says after an edit, once a process takes another's place, and answers
    that are not graded any more because the file has gone."""
    file = tmp_path / "edited.py"
    code = "# coding: latin-1\nimport os\n\n\ndef f(prompt, completion, example):\n"
    file.write_text(code + "    completion or os._exit(1)\n    return ord('é')\n", encoding="latin-1")
    with contextlib.closing(pool_of(file, "f", reward_workers=1)) as pool:
        for edit in (lambda: file.write_text("def f(prompt, completion, example): return 5\n"), file.unlink):
            edit()
            assert pool.submit(0, "", "", {}).result().failure == "its process ended, exit code 1"
            assert pool.submit(0, "", "a", {}).result() == (233, None)


def test_a_process_that_cannot_be_replaced(file, monkeypatch):
    """Catches answers that lose their grades because another's process cannot be started again while others grade, and
    answers that wait for ever once none is left."""
    with contextlib.closing(pool_of(file, "evil", reward_workers=2)) as pool:

        def at_the_limit(*args, **options):
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(subprocess, "Popen", at_the_limit)
        names = ["leave_at_once", *["truth"] * 20]
        grades = [each.result() for each in [pool.submit(0, "p", name, {}) for name in names]]
        assert [grade.failure for grade in grades if grade.failure] == ["its process ended, exit code 0"]
        grades = [each.result() for each in [pool.submit(0, "p", name, {}) for name in ("leave_at_once", "truth")]]
        assert "cannot be started: [Errno 11] Resource temporarily unavailable" in grades[1].failure


def test_files_that_cannot_be_imported(tmp_path, monkeypatch):
    """Catches a run that begins without its graders, or waits for them for ever."""
    monkeypatch.setenv("PID_OF_THIS_TEST", str(os.getpid()))
    for name, there in (("raises", "1 / 0"), ("ends", "os._exit(7)"), ("hangs", "time.sleep(999)")):
        code = f"import os, time\nif os.getpid() != int(os.environ['PID_OF_THIS_TEST']):\n    {there}\n"
        (tmp_path / f"{name}.py").write_text(code + "def f(prompt, completion, example): return 1\n")
    (tmp_path / "beside_it.py").write_text("VALUE = 7")
    (tmp_path / "imports.py").write_text(
        "from beside_it import VALUE\ndef f(prompt, completion, example): return VALUE"
    )
    pool = Pool([load_grader("--reward_fn", f"{tmp_path / 'imports.py'}:f")], GradingArgs(reward_workers=1))
    assert pool.submit(0, "", "", {}).result().value == 7
    pool.close()
    with pytest.raises(ValueError, match=r"raises\.py cannot be imported: ZeroDivisionError"):
        pool_of(tmp_path / "raises.py", "f")
    ended = r"--reward_fn \S*ends\.py:f: its process ended, exit code 7 while it imported the file$"
    with pytest.raises(ValueError, match=ended):
        pool_of(tmp_path / "ends.py", "f")
    slow = r"--reward_fn \S*hangs\.py:f: its import takes over 1 s; do slow work in the function$"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=slow):
        patch.setattr("models.workers.START_SECONDS", 1.0)
        pool_of(tmp_path / "hangs.py", "f")
    (tmp_path / "later.py").write_text(
        "import os\n"
        "import beside_it\n"
        "def f(prompt, completion, example):\n"
        "    if completion == 'end': os.remove(beside_it.__file__); os._exit(0)\n"
        "    return 1\n"
    )
    pool = pool_of(tmp_path / "later.py", "f", reward_workers=1)
    futures = [pool.submit(0, "p", completion, {}) for completion in ("a", "end", "b", "c")]
    assert [outcome(future.result()) for future in futures[:2]] == [1, "its process ended, exit code 0"]
    assert all("No module named 'beside_it'" in outcome(future.result()) for future in futures[2:])
    pool.close()


def test_modules_beside_functions(tmp_path):
    """Catches a module beside a function's file that is silently replaced by one of that name from elsewhere, imported
    by the file, by a module beside it, or within a function."""
    files = {
        "one/near_one.py": "value = 1\n",
        "one/reward.py": "import near_one\ndef f(prompt, completion, example): return near_one.value\n",
        "two/near_one.py": "value = 2\n",
        "two/near_two.py": "from near_one import value\n",
        "two/reward.py": "def f(prompt, completion, example):\n    import near_two\n    return near_two.value\n",
        "three/models.py": "",
        "three/reward.py": "from models.rows import value\n",
        "four/models.py": "",  # nothing imports it
        "four/reward.py": "def f(prompt, completion, example): return 4\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    graders = [load_grader("--reward_fn", f"{folders[i]}/reward.py:f") for i in (0, 3)]
    assert [grader.function("", "", {}) for grader in graders] == [1, 4]
    for folder, name, other in ((folders[1], "near_one", folders[0] / "near_one.py"), (folders[2], "models", "models")):
        what = f"imports {name}, which would be {tiny.ROOT / other}"
        tiny.refused(lambda: load_grader("--reward_fn", f"{folder}/reward.py:f"), f"--reward_fn {folder}", what)  # noqa: B023


def test_nothing_outlives_a_kill(file, mark):
    """Catches worker processes, and processes that functions started in them, that go on after the run is killed."""
    names = ("hang", "spin", "fork_and_hang", "hang_beside_a_daemon", "leave_the_group", "deaf")
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); sys.argv[0] = 'the run'\n"
        "from models.functions import load_grader; from models.workers import GradingArgs, Pool\n"
        "args = GradingArgs(reward_timeout=1000, reward_workers=6)\n"
        "pool = Pool([load_grader('--reward_fn', sys.argv[2])], args)\n"
        "for name in sys.argv[3:]: pool.submit(0, 'p', name, {})\n"
        "print('up', flush=True); time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", program, str(tiny.ROOT), f"{file}:evil", *names]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert run.stdout.readline() == "up\n"
        deadline, sleeps, workers = time.monotonic() + 20, 0, 0
        while not (sleeps == 1 and workers >= 13) and time.monotonic() < deadline:  # one has forked
            time.sleep(0.01)
            lines = processes(mark)
            sleeps, workers = lines.count("sleep 1000.25 "), sum("worker_process" in line for line in lines)
        assert sleeps == 1 and workers >= 13, lines
    finally:
        run.kill()
        run.wait()
    assert gone(mark)


def test_two_events_of_one_process(monkeypatch):
    """Catches a pool that waits for ever: a dead process closes both pipes, the first event replaces it, and the second
    is taken for one of the new process, whose pipe has the lost one's number."""
    worker = SimpleNamespace(process="old", requests=7, replies=8, outgoing=b"more", due=lambda: math.inf)
    attended = []

    def attend(worker, descriptor):
        attended.append(descriptor)
        worker.process, worker.requests, worker.replies = "new", 6, 7

    events = [(8, select.POLLHUP), (7, select.POLLERR)]
    poll = SimpleNamespace(register=lambda descriptor, mask: None, poll=lambda patience: events)
    monkeypatch.setattr(select, "poll", lambda: poll)
    _Dispatcher._wait(SimpleNamespace(workers=[worker], woken=3, _attend=attend))
    assert attended == [8]
