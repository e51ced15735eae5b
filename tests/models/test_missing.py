"""What a machine may lack: scripts do without it, or say so."""

import builtins
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from models import caches, common
from models.common import RuntimeArgs, choose_runtime
from models.gpu import has_triton
from models.tokenizer import Tokenizer
from tests import tiny
from training import optim
from training.optim import OptimArgs, make_optimizer


def test_triton_that_does_not_work(capsys, monkeypatch):
    """Catches Triton taken for working because it is installed (here there is no GPU; elsewhere no compiler), no
    message about it, a second try, and torch.compile, which needs Triton, as the default or as asked for nevertheless;
    Triton tried before it has a folder to write to; and a GPU chosen without its index, or not made the current one."""
    has_triton.cache_clear()
    current = []
    assert not has_triton(torch.device("cpu")) and not has_triton(torch.device("cuda", 0))
    said = capsys.readouterr().err
    assert said.startswith("Triton does not work here") == (importlib.util.find_spec("triton") is not None)
    assert said.count("\n") <= 1
    has_triton(torch.device("cuda", 0))
    assert not capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TRITON_CACHE_DIR")
    for works in (True, False):
        has_cache = lambda device, works=works: works and "TRITON_CACHE_DIR" in os.environ  # noqa: E731
        monkeypatch.setattr(common, "has_triton", has_cache)
        assert choose_runtime(RuntimeArgs(device="cuda", compile=True if works else None)).compile == works
        assert not choose_runtime(RuntimeArgs(device="cuda:1", compile=False)).compile
    with pytest.raises(ValueError, match="--compile: Triton"):
        choose_runtime(RuntimeArgs(device="cuda", compile=True))
    # by index, as torch requires; and Triton runs its kernels on the current GPU
    assert current[:4] == 2 * [torch.device("cuda", 0), torch.device("cuda", 1)]
    has_triton.cache_clear()


def test_triton_that_cannot_be_imported(tmp_path, capsys, monkeypatch):
    """Catches a traceback where Triton is installed and its import fails."""
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: GLIBCXX_3.4.30\\nnot found')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("triton", "models.triton_probe"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    has_triton.cache_clear()
    assert not has_triton(torch.device("cuda", 0))
    assert capsys.readouterr().err.endswith("not used: ImportError: libtriton.so: GLIBCXX_3.4.30 not found\n")
    has_triton.cache_clear()


def test_no_compiler_for_cpus(monkeypatch):
    """Catches a traceback of torch.compile, in a run or in the first update of weights that --cpu_offload keeps."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"--compile: .*g\+\+"):
        choose_runtime(RuntimeArgs(device="cpu", compile=True))
    weight = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    assert make_optimizer(weight, OptimArgs(), compile=True).update is optim._update
    monkeypatch.setattr(optim, "compiles_for_cpu", lambda: True)
    assert make_optimizer(weight, OptimArgs(), compile=True).update is not optim._update


def test_no_home_to_write_to(tmp_path, monkeypatch):
    """Catches compiled code without a place because the home cannot be written, a user's choice of a folder ignored,
    one folder for several nodes or kinds of CPUs: with code that another CPU had left there, an AVX2 CPU computed NaN,
    which was taken for broken weights; and a traceback for a user without a name at the second call."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    (tmp_path / "home").write_text("")  # a file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    caches.keep_compiled_code()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(tempfile.gettempdir())
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = set()
    for capability, amx in (("AVX512", True), ("AVX512", False), ("NO AVX", False), ("NO AVX", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_tile": amx})
        caches.keep_compiled_code()
        found.add(name := Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        assert name.parent == tmp_path / "cache" / "gpt-accelera"
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert len(found) == 3
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(caches.platform, "node", lambda: "node-7")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    caches.keep_compiled_code()
    of_node = tmp_path / "cache" / "gpt-accelera" / "node-7"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(of_node / name.name)
    assert os.environ["TRITON_CACHE_DIR"] == str(of_node / "triton")

    def without_a_name():
        asked.append(1)
        raise KeyError("getpwuid(): uid not found: 0")  # as torch 2.11 for such a user

    asked = []
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.default_cache_dir", without_a_name)
    for given in (of_node / name.name, tmp_path / "mine"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(given))
        caches.keep_compiled_code()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(given)
    assert len(asked) == 1  # asking imports torch._inductor, which takes seconds
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    caches.keep_compiled_code()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == of_node


def test_no_home_at_all(tmp_path, monkeypatch):
    """Catches a folder called ~, or one that a relative XDG_CACHE_HOME names, in each directory that a run starts in,
    for a user id without a name, as containers give."""
    home, elsewhere = Path.home() / ".cache/gpt-accelera", Path(tempfile.gettempdir()) / f"gpt-accelera-{os.getuid()}"
    for given, folder in ((str(tmp_path), tmp_path / "gpt-accelera"), ("caches", home), ("", home)):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert caches.cache_folder() == folder
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert caches.cache_folder() == elsewhere


def test_compiled_code_is_kept(tmp_path):
    """Catches compiled code that stays in torch's default folder, and is lost with /tmp: importing torch writes that
    folder into the environment, where it looks like a user's choice."""
    mine = tmp_path / "torchinductor_of_mine"
    code = f"""
import os, inference.generate
from models.common import *

for given in ("", {str(mine)!r}):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = given or os.environ["TORCHINDUCTOR_CACHE_DIR"]
    choose_runtime(RuntimeArgs(device="cpu"))
    print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    options = {"env": env, "cwd": tiny.ROOT, "text": True}
    found = subprocess.check_output([sys.executable, "-c", code], **options).splitlines()
    assert Path(found[0]).parent == tmp_path / "gpt-accelera" and found[1:] == [str(mine)]


def test_no_sentencepiece(folder, monkeypatch):
    """Catches a traceback where a tokenizer.model is read and the package is not installed."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "sentencepiece":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"tokenizer\.model: is read by sentencepiece, .*pip install"):
        Tokenizer(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 512\n"
POINTERS = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model", "tokenizer.json")


@pytest.mark.parametrize("name", [*POINTERS, "tokenizer_config.json", "prompts.jsonl"])
def test_files_that_git_has_not_fetched(name, tmp_path):
    """Catches a Git LFS pointer, which a clone without LFS holds, reported as a broken file."""
    tiny.write_model(tmp_path, num_hidden_layers=1)
    tiny.write_records(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    if name.endswith("index.json"):
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(POINTER)
    flags = ["--checkpoint_path", tmp_path, "--prompt_file", tmp_path / "prompts.jsonl", "--device", "cpu"]
    result = tiny.run("inference/generate.py", *flags, "--output_file", tmp_path / "out.jsonl")
    assert result.code == 2 and result.stderr.count("\n") == 1, result.stderr
    assert f"{tmp_path / name}" in result.stderr and "is a Git LFS pointer, not the file itself" in result.stderr
