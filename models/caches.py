"""Where a later process finds what an earlier one made and what could be made anew: compiled code, tokenised data."""

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import torch


def cache_folder() -> Path:
    """~/.cache/gpt-accelera; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gpt-accelera"


def keep_compiled_code() -> None:
    """Puts what torch.compile and Triton make into the cache folder, or beside other temporary files where that cannot
    be written, unless TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR name another: torch's own default is lost with /tmp,
    and Triton's fails where there is no home to write to. Nodes of one run, which may share a home, share no such
    folder: what makes its files whole is no promise of a network's file system. Nor do CPUs of several kinds: torch
    (2.13) takes code that is written for vectors of AVX-512 where they are AVX2's, and its numbers are nonsense; and
    what -march=native made of another CPU's instructions, by which a process dies."""
    folder = cache_folder()
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        folder = folder / platform.node()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"gpt-accelera-{os.getuid()}"
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given is None or given == _torchs_own():
        parts = getattr(torch.cpu, "get_capabilities", dict)()  # which torch 2.11 may lack
        able = (torch.backends.cpu.get_cpu_capability(), sorted(parts.items()))
        kind = hashlib.sha256(repr(able).encode()).hexdigest()[:8]
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor-{kind}")
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def _torchs_own() -> str:
    """What torch (2.13) writes into the environment when it is imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # seconds, where nothing else needs it

    return default_cache_dir()
