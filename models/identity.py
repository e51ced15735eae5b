"""What a run was begun with, and whether --resume may go on with what it is given now.

- all flags, whatever script and whoever declared them, but for those that say may_change
- the content of every file and folder that a flag names and the run reads: flags of type Path, unless they say
  `written`, and the file of a function, FILE.py:NAME. Not their path, so data may move; nothing lists them
- what differs is refused by name; --accept_changed NAME goes on knowingly, and the new value is what the run has then
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path

from models.common import Flag, flag, flags_of, say
from models.fingerprint import digest, fingerprint
from models.functions import FunctionPlace

CONTENTS = "content_digests"  # the key beside the flags, {flag: digest}; of a list of places a list


@dataclass(frozen=True, kw_only=True)
class AcceptArgs:
    """What a run that is resumed may do otherwise."""

    accept_changed: list[str] | None = flag(
        None,
        help="with --resume: flags of another value, or of files or folders of other content, than the run was begun "
        "with, to be taken knowingly; names without --, such as seed checkpoint_path",
        may_change=True,
    )


def begun_with(args) -> dict[str, object]:
    """What args.json, and the small file beside an output file, hold: all flags, and the content of what they name.
    Paths are absolute, so that a run can be resumed from elsewhere."""
    values = {each.name: recorded(getattr(args, each.name)) for each in flags_of(type(args))}
    return {**values, CONTENTS: _contents(args)}


def recorded(value: object) -> object:
    """A flag's value as JSON holds it."""
    if isinstance(value, list | tuple):
        return [recorded(each) for each in value]
    value = str(value.resolve()) if isinstance(value, Path) else value
    return json.loads(json.dumps(value, default=str))


def changed_flags(args, now: dict, earlier: dict, who: str) -> frozenset[str]:
    """Names of the flags that have another value, or name other content, than `earlier`, and are accepted. now,
    earlier: of begun_with. Raises ValueError, which begins with `who`, for those that are not accepted, and for an
    --accept_changed that is no flag. One that has not changed is no error: the same command goes on after the next
    kill."""
    flags, accepted = flags_of(type(args)), set(args.accept_changed or ())
    unknown = accepted - {each.name for each in flags}
    if unknown:
        raise ValueError(f"--accept_changed {' '.join(sorted(unknown))}: no flag of this script; give names without --")
    held = [each for each in flags if not _may_change(each, args)]
    if CONTENTS not in earlier and now[CONTENTS]:
        names = ", ".join(f"--{each.name}" for each in held if each.name in now[CONTENTS])
        say(f"{who}: begun before contents were recorded; {names}: compared by path alone, this once")
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
    """Whether a flag names other "content", wherever that lies, or has another "value", where content is not known of
    both. One that is younger than the run had its default."""
    contents = [of.get(CONTENTS, {}).get(each.name) for of in (now, earlier)]
    if None not in contents:
        return "content" if contents[0] != contents[1] else None
    default = None if each.default is MISSING else recorded(each.default)
    formerly = each.metadata["formerly"]
    values = []
    for value in (now[each.name], earlier.get(each.name, default)):
        several = isinstance(now[each.name], list) and not isinstance(value, list) and value is not None
        value = [value] if several else value  # a flag that took one value when the run was begun
        values.append(default if value in ([], formerly, [formerly]) else value)
    return "value" if values[0] != values[1] else None


def _contents(args) -> dict[str, object]:
    found = {}
    for each in flags_of(type(args)):
        value = getattr(args, each.name)
        contents = [_content(place) for place in (value if isinstance(value, list) else [value])]
        if contents and None not in contents and not each.metadata["written"]:
            found[each.name] = contents if isinstance(value, list) else contents[0]
    return found


def _content(place: object) -> str | None:
    """None of what is no place, and of what cannot be read, about which whoever needs it says more."""
    try:
        if isinstance(place, FunctionPlace):
            return f"{digest(place.path)}:{place.name}"
        if isinstance(place, Path) and place.is_dir():
            return fingerprint(place)
        return digest(place) if isinstance(place, Path) and place.is_file() else None
    except (OSError, ValueError):
        return None
