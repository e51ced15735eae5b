"""Downloads a Hugging Face repository into checkpoints/ORG/NAME, ready for --checkpoint_path.

- huggingface_hub does the work: progress bars, parallel files, a token from --token, HF_TOKEN or `hf auth login`
- weights are downloaded in one format: safetensors, or .bin if there is no safetensors; only the shards that the index
  names, so not `original/`, `consolidated.*`, GGUF, ONNX and other copies
- the same command again continues an interrupted download; complete files are not fetched twice
- remote code is neither fetched nor run
"""

import fnmatch
import json
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]
from models.common import flag
from models.files import COPIED_FILES, TOOL_USE
from models.script import run_script

# Files that a folder needs beside its weights, by lower-case name; only from the top level of the repository.
SMALL_FILES = ("config.json", *COPIED_FILES, "licen[cs]e*", "use_policy*", "notice*", "readme*")
# In order of preference: a single file before an index, as models/checkpoint.py and transformers read a folder.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def small_files(names: Iterable[str]) -> list[str]:
    """Returns the config, tokenizer, licence and readme files among a repository's file names: those of the top level
    (fnmatch's * would match slashes too) and the chat template TOOL_USE."""
    top = [name for name in names if "/" not in name or name == TOOL_USE]
    return [name for name in top if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in SMALL_FILES)]


def weight_file(names: Collection[str]) -> str:
    """Returns the file that the weights are read through, an index or a single file. Raises ValueError without one."""
    for name in WEIGHTS:
        if name in names:
            return name
    kinds = sorted({Path(name).suffix for name in names if "/" not in name and Path(name).suffix})
    raise ValueError(f"no weights in a format we read ({', '.join(WEIGHTS)}); its files are {', '.join(kinds)}")


def shards(index_path: str) -> list[str]:
    """Returns the files that an index names, in order. Raises ValueError if it names none."""
    try:
        names = {*json.loads(Path(index_path).read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        names = set()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{Path(index_path).name} is broken, it has no weight_map of files: ask the model's authors")
    return sorted(names)


def check_folder(folder: Path, names: Iterable[str]) -> None:
    """Raises ValueError if the folder holds files that do not come from an earlier download of this repository."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file, not a folder; choose another one")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} if folder.exists() else set()
    present = {name for name in present if not name.startswith(".cache/")}
    if (folder / ".cache" / "huggingface").is_dir():
        foreign, reason = sorted(present - set(names)), "is not in this revision of the repository"
    else:
        foreign, reason = sorted(present), "did not come from this repository"
    if foreign:
        raise ValueError(
            f"--output_dir {folder} already holds {foreign[0]}, which {reason}; choose another --output_dir or remove "
            "the folder"
        )


def fetch(repo: str, folder: Path, revision: str | None, token: str | None) -> tuple[dict[str, int], str]:
    """Downloads the needed files of `repo` into `folder`. Returns ({name: bytes}, commit)."""
    info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings}
    if "config.json" not in sizes:
        raise ValueError("no config.json at its top level: not a model that transformers could open")
    weights = weight_file(sizes)
    check_folder(folder, sizes)
    wanted = [*small_files(sizes), weights]
    if weights.endswith(".index.json"):
        wanted += shards(hf_hub_download(repo, weights, revision=info.sha, local_dir=folder, token=token))
    missing = [name for name in wanted if name not in sizes]
    if missing:
        raise ValueError(f"{weights} names {missing[0]}, which the repository does not have")

    # The commit, not the branch's name: a push in the meantime must not mix two versions.
    patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in wanted]
    snapshot_download(repo, revision=info.sha, local_dir=folder, allow_patterns=patterns, token=token)

    # If the folder exists, snapshot_download only warns when the hub refuses access, and trusts the files there.
    for name in wanted:
        path = folder / name
        if not path.is_file() or (sizes[name] is not None and path.stat().st_size != sizes[name]):
            raise OSError(f"{path} is missing or incomplete: delete it if it is there and run the same command again")
    for leftover in folder.glob(".cache/huggingface/download/*.incomplete"):  # of a killed download, never read again
        leftover.unlink(missing_ok=True)
    return {name: (folder / name).stat().st_size for name in wanted}, info.sha


@dataclass(frozen=True, kw_only=True)
class DownloadArgs:
    """Downloads a Hugging Face repository into checkpoints/ORG/NAME, ready for --checkpoint_path."""

    repo: str = flag(help="repository on the Hugging Face hub", positional=True, metavar="ORG/NAME")
    output_dir: Path | None = flag(None, help="folder to write; default: checkpoints/ORG/NAME")
    revision: str | None = flag(None, help="branch, tag or commit; default: the main branch")
    token: str | None = flag(None, help="access token; default: HF_TOKEN, or the token of `hf auth login`")


def main(args: DownloadArgs) -> None:
    repo, hub = args.repo, constants.ENDPOINT
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise ValueError(f"{repo!r} is not a repository name: write it as ORG/NAME, e.g. meta-llama/Llama-2-7b-chat-hf")
    folder = args.output_dir or Path("checkpoints") / repo
    try:
        files, commit = fetch(repo, folder, args.revision, args.token or None)
    except GatedRepoError as error:
        raise ValueError(
            f"{repo} is gated: accept its terms at {hub}/{repo}, make a token at {hub}/settings/tokens, "
            "then pass it as HF_TOKEN=hf_... or --token"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"no repository {repo} on {hub}: check the spelling; if it is private, pass a token that may read it "
            f"(from {hub}/settings/tokens) as HF_TOKEN=hf_... or --token"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repo} has no revision {args.revision!r}: --revision takes a branch, tag or commit"
        ) from error
    except EntryNotFoundError as error:
        raise OSError(f"{repo}: {one_line(error)}") from error
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise OSError(f"{hub} answered for {repo}: {one_line(error)}; try again later") from error
        raise ValueError(
            f"{hub} refused {repo} ({error.response.status_code}): the token is wrong or may not read it; "
            f"make one at {hub}/settings/tokens and pass it as HF_TOKEN=hf_... or --token"
        ) from error
    except HTTPError as error:  # everything below HTTP: name lookup, refused connection, timeout, proxy
        raise OSError(
            f"cannot reach {hub} ({one_line(error)}): check the network, then run the same command"
        ) from error
    except ValueError as error:
        raise ValueError(f"{repo}: {one_line(error)}") from error

    print(f"{repo} ({commit[:12]}): {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB in {folder}")
    print(
        f"Try: python inference/generate.py --checkpoint_path {folder} --prompt 'Once upon a time' --max_new_tokens 64"
    )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    run_script(main, DownloadArgs)
