"""The rules of the code base: which file may import which, how long a file may be, and that a flag is declared once."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from models.common import flags_of
from tests import tiny

MAY_IMPORT = {  # folder: the folders it may import from
    "models": {"models"},
    "inference": {"inference", "models"},
    "training": {"training", "models"},
    "scripts": {"scripts", "training", "inference", "models"},
}
FILES = {
    path.relative_to(tiny.ROOT).with_suffix("").as_posix().replace("/", "."): path
    for folder in MAY_IMPORT
    for path in sorted((tiny.ROOT / folder).rglob("*.py"))
}


def is_script(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
SCRIPTS = [name for name, tree in TREES.items() if is_script(tree)]


def imports_of(tree: ast.Module) -> set[str]:
    """The files of this repository that a file imports, also within its functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in FILES}


IMPORTS = {name: imports_of(tree) for name, tree in TREES.items()}


def find_loop(imports: dict[str, set[str]]) -> list[str]:
    """A cycle of files that import each other; [] if there is none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in finished:
            for other in sorted(imports[name]):
                loop = visit(other, [*path, name])
                if loop:
                    return loop
            finished.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(imports))), [])


def test_arrows_run_down():
    """Catches training/ that imports inference/ or the other way round, models/ that imports either, a script that
    imports another one, and files that import each other in a cycle, within functions too."""
    assert len(FILES) > 40 and len(SCRIPTS) > 10
    for name, imported in IMPORTS.items():
        for other in imported:
            arrow = f"{name} -> {other}"
            assert other.partition(".")[0] in MAY_IMPORT[name.partition(".")[0]], arrow
            assert other not in SCRIPTS, f"{arrow}, which is a script"
    assert not find_loop(IMPORTS)


def test_loops_are_seen():
    """Catches a search that finds no cycle where there is one."""
    assert find_loop({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_loop({"a": {"a"}}) == ["a", "a"] and not find_loop({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    looped = {**IMPORTS, "models.common": {*IMPORTS["models.common"], "models.fsdp"}}
    assert find_loop(looped)
    assert imports_of(ast.parse("def f():\n    from training import losses")) == {"training.losses"}


def test_files_are_short():
    """Catches a file of more than 500 lines, of the tests too: by then it does more than one thing."""
    paths = [path for folder in (*MAY_IMPORT, "tests") for path in (tiny.ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(tiny.ROOT)): path.read_text(encoding="utf-8").count("\n") for path in paths}
    assert len(paths) > 150 and not {name: length for name, length in lengths.items() if length > 500}


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_are_fields(name):
    """Catches a script with a parser of its own, a flag without help, and a flag whose help is declared in two
    dataclasses (another default needs no second declaration)."""
    module = importlib.import_module(name)
    for job in (None, *getattr(module, "JOBS", ())):
        Args = tiny.args_of(module, [job] if job else [])
        assert dataclasses.is_dataclass(Args) and Args.__dataclass_params__.frozen and Args.__doc__
        for each in flags_of(Args):
            assert each.metadata["options"]["help"], each.name
            fields = [vars(c)["__dataclass_fields__"].get(each.name) for c in Args.__mro__[:-1]]
            assert len({id(field) for field in fields if field and field.metadata}) == 1, each.name
    assert "add_argument" not in Path(module.__file__).read_text(encoding="utf-8")


def test_the_tests_of_a_file_share_a_process(request):
    """Catches a pytest-xdist that ignores the groups of conftest.py without a word, as 3.8 does under pytest 9.2: both
    processes then build the fixtures of most files, and start ranks."""
    assert "@" in request.node.nodeid or not request.config.getoption("loadgroup", False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_folder_of_a_script_is_not_searched(name, monkeypatch):
    """Catches a script in whose process `import graders` finds training/graders.py, in place of a user's own module."""
    lines = FILES[name].read_text(encoding="utf-8").split("\n")
    end = next((number for number, line in enumerate(lines, start=1) if line.startswith("sys.path")), None)
    if end is None:
        assert not IMPORTS[name]  # it runs without the repository
        return
    found = [str(FILES[name].parent), "", "/elsewhere"]
    monkeypatch.setattr("sys.path", found)
    exec("\n".join(lines[:end]), {"__file__": str(FILES[name])})
    assert found == [str(tiny.ROOT), "", "/elsewhere"]


def test_a_server_that_fails_is_no_second_suite():
    """Catches an error in the server of tests/forked.py that leaves it in the tests' own code, as a copy of them."""
    code = """import os
from tests.forked import start_server
try:
    start_server().sendall(b"no request\\n")
    print(os.waitstatus_to_exitcode(os.wait()[1]))
finally:
    print("left")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.stdout == "1\nleft\n" and "JSONDecodeError" in done.stderr, done.stderr
