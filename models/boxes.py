r"""The boxes around answers: `\boxed{42}`."""

import re


def closed_boxes(text: str, names: str = "boxed") -> list[tuple[int, str]]:
    r"""Returns (start, content) of each closed `\boxed{}`, even if empty. An escaped brace belongs to the answer and
    need not be balanced; `\\{` is a line break and a brace that must be. names: of commands, with | between them."""
    opened, boxes = [], []
    for match in re.finditer(rf"(\\(?:{names})\s*\{{)|(?<!\\)(?:\\\\)*\\[{{}}]|([{{}}])", text):
        if match[1] or match[2] == "{":
            opened.append((match.start(), match.end()) if match[1] else None)
        elif match[2] and opened and (box := opened.pop()) is not None:
            boxes.append((box[0], text[box[1] : match.start()].strip()))
    return boxes
