"""The cache folder: compiled code and tokenised data that later processes reuse, and could make anew."""

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import torch


def cache_folder() -> Path:
    """Returns ~/.cache/gpt-accelera, which may not exist yet; a temporary folder for a user without a home, of whom
    expanduser leaves the ~. A relative XDG_CACHE_HOME is ignored, as its specification says."""
    given, home = Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~/.cache"))
    caches = next((path for path in (given, home) if path.is_absolute()), None)
    return _temporary() if caches is None else caches / "gpt-accelera"


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"gpt-accelera-{os.getuid()}"


def keep_compiled_code() -> None:
    """Makes torch.compile and Triton cache compiled code in the cache folder, or in the temporary folder if that is not
    writable; TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR take precedence. torch's own default is lost with /tmp, and
    Triton's fails without a writable home. Each node of a run has its own folder, even with a shared home: a network
    file system does not guarantee that cached files appear whole. So has each kind of CPU: torch (2.13) would reuse
    code for AVX-512 vectors on AVX2, with nonsense results, and -march=native code of another CPU, which kills the
    process."""
    folder = cache_folder()
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        folder = folder / platform.node()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = _temporary()
    parts = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may lack it
    able = (torch.backends.cpu.get_cpu_capability(), sorted(parts.items()))
    own = str(folder / f"inductor-{hashlib.sha256(repr(able).encode()).hexdigest()[:8]}")
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given is None or (given != own and given == _torchs_own()):  # own: of an earlier call, or of a parent
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = own
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def _torchs_own() -> str | None:
    """Returns the default that torch (2.13) itself writes into the environment when it is imported; None for a user
    without a name, for whom torch 2.11 has none."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds, unless imported before

    try:
        return default_cache_dir()
    except (KeyError, OSError):
        return None
