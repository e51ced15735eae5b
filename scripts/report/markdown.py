"""Formats the report of scripts/gpu_report.py as Markdown."""

from scripts.workload import counted


def markdown(header: dict[str, str], sections: dict[str, tuple[str, list[dict]]]) -> str:
    """header: date, commit, card and so on. sections: name -> (title, rows as scripts/report/record.py writes them)."""
    lines = [
        "# GPU report",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(text)} |" for name, text in header.items()),
    ]
    rows = [row for _, found in sections.values() for row in found]
    lines += ["", verdict(rows), "", "Goals are for a 7B or 8B model in bf16 on one H100."]
    for title, found in sections.values():
        lines += ["", f"## {title}", "", *section_lines(found)]
    return "\n".join(lines) + "\n"


def verdict(rows: list[dict]) -> str:
    """Summarises the report in a line."""
    checks = [row for row in rows if row["kind"] == "check"]
    goals = [row for row in rows if row["kind"] == "figure" and row["met"] is not None]
    errors = sum(row["kind"] == "error" or row.get("state", "done").startswith(("failed", "ended")) for row in rows)
    right, met = sum(row["ok"] for row in checks), sum(row["met"] for row in goals)
    return f"**{right} of {len(checks)} checks right, {met} of {len(goals)} goals met, {counted(errors, 'failure')}.**"


def section_lines(rows: list[dict]) -> list[str]:
    ends = [row for row in rows if row["kind"] == "section"]
    if not rows:
        return ["Not begun."]
    lines = list(map(_state, ends)) or ["Under way when this was written."]
    found = [row for row in rows if row["kind"] != "section"]
    if found:
        lines += ["", "| | found | wanted | | |", "|---|---|---|---|---|", *map(_row, found)]
    return lines


def _state(row: dict) -> str:
    seconds = f" in {row['seconds']:.0f} s" if "seconds" in row else ""
    detail = f"\n\n```\n{row['detail']}\n```" if row.get("detail") else ""
    return f"{row['state'].capitalize()}{seconds}.{detail}"


def _row(row: dict) -> str:
    cells = ("", "", "**failed**" if row["kind"] == "error" else "")
    if row["kind"] == "check":
        cells = (f"{row['value']:.2g}", f"at most {row['bound']:g}", "right" if row["ok"] else "**WRONG**")
    elif row["kind"] == "figure":
        met = {True: "met", False: "not met", None: ""}[row["met"]]
        cells = (f"{_number(row['value'])} {row['unit']}", _goal(row), met)
    return "| " + " | ".join(map(_cell, (row["name"], *cells, row["detail"]))) + " |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _goal(row: dict) -> str:
    if row["goal"] is None:
        return ""
    return f"{'at most' if row['unit'] == 's' else 'at least'} {_number(row['goal'])}"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
