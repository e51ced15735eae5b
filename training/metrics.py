"""metrics.jsonl, samples.jsonl and dashboards. The files hold JSON lines, each with its step; a resumed run drops the
lines after its checkpoint's step and writes them again.
"""

import importlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

from models.common import is_main_rank, on_main
from models.files import naming_file, read_json_object, write_json, write_whole
from models.functions import short

UNFINISHED = "unfinished.json"  # the metrics of a step whose evaluation a signal interrupted, or whose export failed
HAS_LINE = "has_line"  # key there: whether the step has a line already, because a run ends here that was to go on


def check_installed(report_to: str) -> None:
    """Raises ValueError that says what to install if the package of --report_to cannot be imported."""
    try:
        if report_to != "none":
            importlib.import_module("torch.utils.tensorboard" if report_to == "tensorboard" else report_to)
    except Exception as error:  # whatever the package's imports raise
        raise ValueError(f"--report_to {report_to}: {short(error)}; pip install {report_to}") from error


def logged(path: Path) -> Iterator[tuple[dict, bytes]]:
    """Yields the lines of an earlier run, each with its `step`, and their bytes; skips an incomplete one. Raises
    ValueError if another program wrote a line."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], start=1):
        if line.endswith(b"\n"):
            try:
                values = json.loads(line)
                values["step"] + 0
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: not a line that a training script wrote") from None
            yield values, line


class Log:
    """A file of JSON lines, each with its `step`, that the main rank appends to. Opening it drops an incomplete line
    and those after `after_step`, which the resumed run writes again. Construction is a collective."""

    def __init__(self, path: Path, after_step: int):
        self.path = path
        kept = (line for values, line in logged(path) if values["step"] <= after_step)
        on_main(lambda: write_whole(path, b"".join(kept)))

    def write(self, *lines: dict) -> None:
        """Raises OSError that names the file if it cannot be written."""
        if is_main_rank():
            # backslashreplace writes a lone surrogate, which UTF-8 cannot encode, as JSON's own escape
            with naming_file(self.path), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_unfinished(output_dir: Path, step: int, total_steps: int) -> tuple[dict[str, float], bool]:
    """Returns (the metrics of this step if its evaluation is missing, else {}; whether a signal interrupted it, rather
    than that the run ends here now although it was to take more steps). Deletes the file if it is of another step."""
    path = output_dir / UNFINISHED
    line = read_json_object(path, missing_ok=True)
    if line.get("step", step) != step:
        path.unlink()
        line = {}
    if line:
        return line, not line.pop(HAS_LINE, False)
    if not 0 < step == total_steps:
        return {}, False
    line = next((line for line, _ in logged(output_dir / "metrics.jsonl") if line["step"] == step), {"step": step})
    if any(name.startswith("eval_") for name in line):
        return {}, False
    write_json(path, line | {HAS_LINE: True})  # kept until the line is written again and the model exported
    return line, False


class Metrics:
    """metrics.jsonl and a dashboard; only the main rank writes."""

    def __init__(self, output_dir: Path, *, after_step: int = 0, report_to: str = "none"):
        """after_step: as for Log. A collective."""
        self._log, self._report, self._close = Log(output_dir / "metrics.jsonl", after_step), None, None
        on_main(lambda: self._begin_report(output_dir, after_step, report_to))

    def _begin_report(self, output_dir: Path, after_step: int, report_to: str) -> None:
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(output_dir / "tensorboard", purge_step=after_step + 1)
            self._report = lambda step, values: [board.add_scalar(name, x, step) for name, x in values.items()]
            self._close = board.close
        elif report_to == "wandb":
            import wandb

            id_file = output_dir / "wandb_id.txt"  # one wandb run, however often this run is resumed
            if not id_file.exists():
                id_file.write_text(secrets.token_hex(8))
            try:
                run = wandb.init(dir=output_dir, name=output_dir.name, id=id_file.read_text(), resume="allow")
            except Exception as error:  # wandb has its own exceptions: no API key, no network
                raise ValueError(f"--report_to wandb: {short(error)}") from error
            self._report = lambda step, values: run.log(values, step=step)
            self._close = run.finish

    def write(self, values: dict[str, float]) -> None:
        self._log.write(values)
        if self._report is not None:
            self._report(values["step"], {name: x for name, x in values.items() if name != "step"})

    def close(self) -> None:
        """Closes the dashboard; not called when a run ends with an unexpected error."""
        if self._close is not None:
            self._close()
