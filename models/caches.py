"""Where a later process finds what an earlier one made and what could be made anew: compiled code, tokenised data."""

import os
import platform
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/gpt-accelera; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gpt-accelera"


def keep_compiled_code() -> None:
    """Puts what torch.compile and Triton make into the cache folder, or beside other temporary files where that cannot
    be written, unless TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR name another: torch's own default is lost with /tmp,
    and Triton's fails where there is no home to write to. Nodes of one run, which may share a home, share no such
    folder: what makes its files whole is no promise of a network's file system."""
    folder = cache_folder()
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        folder = folder / platform.node()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"gpt-accelera-{os.getuid()}"
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(folder / name))
