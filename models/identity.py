"""Records a run's flags and the content of its inputs, and refuses a --resume, or ranks, with different ones.

- all flags are compared, whichever script or group declares them, except those declared with may_change
- so is the content of every input file and folder: of all flags of type Path, unless declared `written`, and the file
  of a function, FILE.py:NAME. Paths are not compared, so data may move. New flags are included automatically
- a difference is an error that names the flag; --accept_changed NAME accepts it, and the run then has the new value
- ranks are compared in the same way at the start, in all flags but those of a machine (OF_A_NODE): nodes may be given
  other commands, or hold other files at a path
"""

import json
import os
import socket
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch.distributed as dist

from models.common import Flag, flag, flags_of, say
from models.fingerprint import ADAPTER_CONFIG, digest, fingerprint
from models.functions import FunctionPlace
from models.sharing import several_ranks, wait_for_all_ranks

CONTENTS = "content_digests"  # key beside the flags: {flag: digest, or a list of digests for a list of paths}
# Flags with these endings name a data file, a model or an adapter. Another folder is a mistake that is reported later;
# it may be a whole disk, and is not hashed.
NO_OTHER_FOLDER = ("_file", "checkpoint_path", "adapter_path")
# Flags in which nodes may differ. Not all that a resumed run may change: some of these decide which collectives run.
OF_A_NODE = ("data_cache", "data_workers", "reward_workers", "reward_memory")


@dataclass(frozen=True, kw_only=True)
class AcceptArgs:
    """Changes that a resumed run accepts."""

    accept_changed: list[str] | None = flag(
        None,
        help="with --resume: flags whose value, or whose file's or folder's content, may differ from what the run was "
        "begun with; names without --, such as seed checkpoint_path",
        may_change=True,
    )


def begun_with(args) -> dict[str, object]:
    """Returns the content of args.json, or of the small file beside an output file: all flags, and digests of the files
    that they name. Paths are absolute, so that a run can be resumed from another directory."""
    values = {each.name: recorded(getattr(args, each.name)) for each in flags_of(type(args))}
    return {**values, CONTENTS: _contents(args)}


def recorded(value: object) -> object:
    """Converts a flag's value to the form that JSON stores."""
    if isinstance(value, list | tuple):
        return [recorded(each) for each in value]
    value = str(value.resolve()) if isinstance(value, Path) else value
    return json.loads(json.dumps(value, default=str))


def changed_flags(args, now: dict, earlier: dict, who: str) -> frozenset[str]:
    """Returns the names of flags whose value or content differs from `earlier`, all of them accepted. now, earlier:
    from begun_with(). Raises ValueError, which begins with `who`, for differences that are not accepted, and for a name
    in --accept_changed that is no flag. An accepted flag without a difference is no error: the same command works again
    after the next kill."""
    flags, accepted = flags_of(type(args)), set(args.accept_changed or ())
    unknown = accepted - {each.name for each in flags}
    if unknown:
        raise ValueError(f"--accept_changed {' '.join(sorted(unknown))}: no flag of this script; give names without --")
    held = [each for each in flags if not _may_change(each, args)]
    differences = [(each.name, _difference(each, now, earlier)) for each in held]
    content, value = ([name for name, what in differences if what == kind] for kind in ("content", "value"))
    changed = {*content, *value}
    if changed & accepted:
        say(f"{who}: goes on with other {', '.join(f'--{name}' for name in sorted(changed & accepted))}, as accepted")
    if changed - accepted:
        other = ", ".join(f"--{name}" for name in value if name not in accepted)
        reasons = [f"the run was begun with other {other}"] if other else []
        reasons += [f"--{name}: other content than the run was begun with" for name in content if name not in accepted]
        names = " ".join(name for name in (*value, *content) if name not in accepted)
        raise ValueError(f"{who}: {'; '.join(reasons)}; go on knowingly with --accept_changed {names}")
    return frozenset(changed)


def _may_change(each: Flag, args) -> bool:
    may_change = each.metadata["may_change"]
    return may_change(args) if callable(may_change) else may_change


def _difference(each: Flag, now: dict, earlier: dict) -> str | None:
    """Returns "content" if a flag's files differ in content, or "value" if its value differs, which is compared unless
    both contents are known. A flag that is newer than the run had its default then."""
    contents = [of.get(CONTENTS, {}).get(each.name) for of in (now, earlier)]
    if None not in contents:
        return "content" if contents[0] != contents[1] else None
    default = None if each.default is MISSING else recorded(each.default)
    return "value" if now[each.name] != earlier.get(each.name, default) else None


def check_ranks_agree(args, begun: dict) -> None:
    """Raises ValueError, on all ranks, if one has another flag than rank 0, or other content in its files. begun:
    begun_with() of rank 0, or {} to compare no content. A collective. Of ranks that were given the same flags on one
    node, only the first reads files; paths may differ where the content is the same."""
    if not several_ranks():
        return
    own, theirs = (socket.gethostname(), os.environ.get("GROUP_RANK"), vars(args)), begun.get(CONTENTS, {})
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    reads = bool(theirs) and 0 < dist.get_rank() == ranks.index(own)
    now, earlier = vars(args) | {CONTENTS: _contents(args) if reads else theirs}, ranks[0][2] | {CONTENTS: theirs}
    flags = [each for each in flags_of(type(args)) if each.name not in OF_A_NODE]
    kinds = {each.name: _difference(each, now, earlier) for each in flags}
    names = [f"other content of --{name}" for name, kind in kinds.items() if kind == "content"]
    names = names or [f"another --{name}" for name, kind in kinds.items() if kind == "value"]
    found: list = [None] * len(ranks)
    wait_for_all_ranks()  # hashing may take longer than a collective's timeout
    dist.all_gather_object(found, ", ".join(names))
    for rank, names in enumerate(found):
        if names:
            raise ValueError(f"rank {rank} on {ranks[rank][0]} has {names} than rank 0 on {ranks[0][0]}")


def _contents(args) -> dict[str, object]:
    found = {}
    for each in flags_of(type(args)):
        if each.metadata["written"]:  # maybe 50 GB, and the caller's own
            continue
        value = getattr(args, each.name)
        contents = [_content(place, each.name) for place in (value if isinstance(value, list) else [value])]
        if contents and None not in contents:
            found[each.name] = contents if isinstance(value, list) else contents[0]
    return found


def _content(place: object, name: str) -> str | None:
    """Returns the digest of a flag's file, folder or function; None otherwise, or if reading fails (reported later).
    name: the flag's, which tells whether a folder is an adapter, and may be one of other files."""
    try:
        if isinstance(place, FunctionPlace):
            return f"{digest(place.path)}:{place.name}" if place.path.is_file() else None  # a pipe would never end
        if isinstance(place, Path) and place.is_dir():
            of_adapter = name.endswith("adapter_path")
            configs = (ADAPTER_CONFIG,) if of_adapter else ("config.json", ADAPTER_CONFIG)
            if not any((place / config).is_file() for config in configs) and name.endswith(NO_OTHER_FOLDER):
                return None
            return fingerprint(place, of_adapter=of_adapter)
        return digest(place) if isinstance(place, Path) and place.is_file() else None
    except (OSError, ValueError):
        return None
