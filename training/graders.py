r"""Verifiable rewards: functions (prompt, completion, example) -> number that compare an answer with the record's own.

    --reward_fn training/graders.py:math_answer        (train_ppo.py, train_grpo.py; score.py has --grader)

- the right answer is the record's `answer`, or else its `solution`, `label`, `gold` or `target`; in a worked solution,
  the marked answer (GSM8K's `#### 42`, MATH's `\boxed{}`). A list holds several right answers
- only the text after `</think>` counts, if there is one. The answer is the last `\boxed{}` in it, else the text after
  the last `####` (unless that is a heading), in the last `<answer>`, which may mark its answer in these ways, or after
  the last "answer is", else the last number. If a text has boxes and all are unclosed or empty, there is no answer
- training/mathematics.py decides which answers are mathematically equal
- worker processes import this file, so it imports neither torch nor anything else that is slow to import
"""

import re

from models.boxes import closed_boxes
from training.mathematics import MULTIPLES, UNITS, equal, last_number_in

GOLD_FIELDS = ("answer", "solution", "label", "gold", "target")
ANSWER_IS = re.compile(  # in English and Chinese
    r"\banswers?\b[^.\n:=]{0,40}?\b(?:is|are|equals)\b\s*:?|\banswers?\W{0,3}[:=]"
    r"|\u7b54\u6848\W{0,3}[\u662f\u4e3a\u70ba:\uff1a]",
    re.I,
)
LED_BY = re.compile(r"(?:\W|\b(?:so|thus|hence|therefore|the|my|our|final)\b)*", re.I)  # before "answer is"
# Behind "the answer is": words in front of the answer; how it was found; and what states none: "I hope it is correct".
HOW = "(?:calculated|computed|obtained|found|given|expressed)"
LEAD = re.compile(
    r"(?:[\s,:]*(?:\b(?:therefore|thus|then|hence|clearly|obviously|indeed|simply|just|exactly|equal to|as follows|"
    rf"the following)\b|\b{HOW}(?:\s+(?:as|by|to be)\b(?!\s+\w+ing\b)|\s*:)))+[\s,:]*",
    re.I,
)
ITS_WAY = re.compile(rf"{HOW}\b", re.I)
NO_ANSWER = re.compile(
    r"(?:correct|right|verified|helpful|useful|clear|complete|below|above|based|depends|in\s+\w+$)\b(?!.*\d)", re.I
)
SENTENCE_END = re.compile(
    r"(?<!\bRs)[.!?](?:\s|$)|\n|;|,\s+(?!and\b|or\b)(?=[a-z]{2})|[\s(](?:because|since|as|so|which)\s"
    r"|[\u3002\uff01\uff1b]|\uff0c(?=[\u2e80-\uffef])"
)
STATED_CHOICE = re.compile(  # "the correct option is (C)"; in "C is correct, not A": C
    r"\b(?:correct|right|best)\s+(?:option|choice)\b[^.\n]{0,20}?(?:\bis|:)\W{0,6}([A-J])(?!'?\w)"
    r"|(?<!\w)(?<!\w')([A-J])\W{0,4}\s+is\s+(?:the\s+)?(?:correct|right|best)\b(?!\s*\?)",
    re.A,
)
SEVERAL_CHOICES = re.compile(  # "(A) and (B)", "A, B or C"; but not "B, I think" or "B, A is wrong"
    r"\W*[A-J]\W*?(?:[,/&]|\band\b|\bor\b)\W*(?:(?:and|or)\W+)?[A-J](?!'?\w)(?!(?<=[AI])\s+[a-z])(?!\s+is\b)", re.A
)
AND = re.compile(r"\s*[,;]?\s*(?:and|or)\s+(?:\w+\s*=\s*)?|\s*,\s*")  # between the formulas of a list
MEASURE = re.compile(rf"\s*(?:\\?%|(?:percent|{'|'.join([*MULTIPLES, *UNITS])})(?![\w'^]))")
HEADING = re.compile(  # a Markdown heading after ####, with text below it
    r"(?:(?:step|part|case)\s*\d+\b|(?:final\s+|the\s+)*(?:answers?|solution|conclusion|explanation|summary|results?|check"
    r"|verification|calculations?|analysis|reasoning|approach|method|note|step|part|case|problem)\b)[^\n\d]*\n\s*\S",
    re.I,
)
BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]+)")

# ----------------------------------------------------------------------------------------- graders


def exact_match(prompt: str, completion: str, example: dict) -> float:
    """Returns 1 if the marked answer, or the whole text if none is marked, is exactly a right one, ignoring white space
    around it."""
    answer = final_part(after_thinking(completion))
    return float(any(answer.strip() == gold.strip() for gold in gold_answers(example)))


def math_answer(prompt: str, completion: str, example: dict) -> float:
    """Returns 1 if the final answer equals a right one mathematically."""
    text, golds = after_thinking(completion), gold_answers(example)  # a record without one raises for every answer
    answer = marked_answer(text)
    answers = [answer]
    if answer is None or (NO_ANSWER.match(answer) and answer == _stated(text)):  # "18. I hope the answer is right"
        answers.append(last_number_in(text))
    return float(any(equal(each, gold) for each in answers if each for gold in golds))


def last_number(prompt: str, completion: str, example: dict) -> float:
    """Returns 1 if the last number of the text equals a right answer, whatever is marked as the answer."""
    answer, golds = last_number_in(after_thinking(completion)), gold_answers(example)
    return float(bool(answer) and any(equal(answer, gold) for gold in golds))


def multiple_choice(prompt: str, completion: str, example: dict) -> float:
    """Returns 1 if the completion chooses the right letter and no other. The record has the letter, "B" or "(B)", maybe
    followed by the text of the choice, or the number of the choice, counted from 0."""
    letters = [
        "ABCDEFGHIJ"[int(gold)] if gold in range(10) and type(gold) is not bool else _letter_of_record(str(gold))
        for gold in raw_golds(example)
    ]
    if None in letters:
        raise ValueError(f"the right choice is no letter: {raw_golds(example)}")
    text = after_thinking(completion)
    answer = marked_answer(text)
    if answer is not None and SEVERAL_CHOICES.match(_bare(answer)):
        return 0.0
    chosen = letter_of(answer) if answer is not None else None
    if chosen is None and (answer is None or "\\boxed" not in text):
        chosen = last_letter_in(text)
    return float(chosen in letters)


def format_reward(prompt: str, completion: str, example: dict) -> float:
    r"""Returns 1 for `<think>...</think>` followed by the answer: one non-empty `<answer>...</answer>` and no more, or
    text with a closed, non-empty `\boxed{}`. Each tag occurs once; `<think>` may be the end of the prompt: score.py
    sees it there with a --checkpoint_path, the folder of the model that answered."""
    text = completion.strip()
    if not text.startswith("<think>") and prompt.rstrip().endswith("<think>"):
        text = "<think>" + text
    tags = [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    if not text.startswith("<think>") or tags[:2] != [1, 1] or tags[2] != tags[3] or tags[2] > 1:
        return 0.0
    answer = text.partition("</think>")[2].strip()
    if tags[2]:
        is_tagged = answer.startswith("<answer>") and answer.endswith("</answer>")
        return float(is_tagged and bool(answer[len("<answer>") : -len("</answer>")].strip()))
    return float(bool(boxed_answer(answer)))


# ---------------------------------------------------------------------------------- finding answers


def raw_golds(example: dict) -> list:
    for name in GOLD_FIELDS:
        value = example.get(name)
        # an empty value would silently match no answer; pandas writes NaN for a missing value
        golds = [gold for gold in (value if isinstance(value, list) else [value]) if gold not in (None, "", [])]
        if golds := [gold for gold in golds if gold == gold]:
            if not all(isinstance(gold, str | int | float) for gold in golds):  # TriviaQA's is a dict with aliases
                raise ValueError(f"the right answer in {name} is neither text nor a number, nor a list of them")
            return golds
    raise ValueError(f"the record has no right answer: none of {', '.join(GOLD_FIELDS)}")


def gold_answers(example: dict) -> list[str]:
    """Returns the record's right answers; of 18.0 also 18: pandas writes integers of a column with gaps as floats."""
    golds = raw_golds(example)
    whole = [int(gold) for gold in golds if isinstance(gold, float) and gold.is_integer()]
    return [final_part(str(gold)) for gold in golds + whole]


def final_part(text: str) -> str:
    """Returns the answer that a text marks, or the whole text."""
    answer = marked_answer(text)
    return text if answer is None else answer


def after_thinking(text: str) -> str:
    return text.rpartition("</think>")[2]


def marked_answer(text: str) -> str | None:
    r"""Returns the answer that a text marks with `\boxed{}`, `####`, `<answer>` or "the answer is"; "" if its boxes are
    unclosed or empty, None if nothing is marked."""
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    start, end, sign = text.rfind("<answer>"), text.rfind("</answer>"), text.rfind("####")
    tagged = text[start + len("<answer>") : end].strip() if 0 <= start < end else None
    if tagged is not None and (sign < 0 or start < sign < end):
        return _within(tagged)
    last = text[sign + len("####") :].strip() if sign >= 0 else None
    if last is not None and HEADING.match(last) is None:
        line = last.partition("\n")[0]
        found = [match.span() for match in ANSWER_IS.finditer(line)]
        stated = line[found[-1][1] if found else 0 :].strip()
        is_all = not found or LED_BY.fullmatch(line[: found[-1][0]])  # unlike "A. I hope the answer is correct"
        return stated if is_all or not NO_ANSWER.match(stated) else line.strip()
    return _stated(text) if tagged is None else _within(tagged)


def _within(tagged: str) -> str:
    """Returns the answer that the content of `<answer>` marks, or the whole content."""
    answer = marked_answer(tagged)
    return tagged if answer is None or NO_ANSWER.match(answer) else answer


def _stated(text: str) -> str | None:
    """Returns what a text states with "the answer is": rather a number than words, and rather the last."""
    ends = [match.end() for match in ANSWER_IS.finditer(text)][-10:]
    clauses = [clause for end in ends if not ITS_WAY.match(clause := _clause(text[end : end + 500]))]
    stated = [clause for clause in clauses if NO_ANSWER.match(clause) is None]
    with_number = [clause for clause in stated if re.search(r"\d", clause)]
    return (with_number or stated or clauses or [None])[-1]


def boxed_answer(text: str) -> str | None:
    r"""Returns the content of the last closed, non-empty `\boxed{}`, of nested ones the inner; "" if all boxes are
    unclosed or empty; None if there is no box. `\boxed 5` counts as closed."""
    best, found = max((box for box in closed_boxes(text, "boxed|fbox") if box[1]), default=(-1, ""))
    for match in BARE_BOX.finditer(text):
        if match.start() > best:
            best, found = match.start(), match[1]
    return found if best >= 0 or re.search(r"\\(?:boxed|fbox)\b", text) else None


def _clause(text: str) -> str:
    """Returns the statement at the start of a text, without the rest of the sentence or line."""
    text = text.strip().lstrip("*_`: ")
    if lead := LEAD.match(text):
        text = text[lead.end() :].lstrip("*_`: ")
    formula, rest = _formula(text)
    if formula is None:
        return SENTENCE_END.split(text)[0].rstrip("*_`")
    while listed := AND.match(rest):  # "$3$ and $4$", but not "$5$, and $x$ is odd"
        following, behind = _formula(rest[listed.end() :])
        if following is None or not re.search(r"\d", following):
            break
        formula, rest = f"{formula}, {following}", behind
    behind = MEASURE.match(rest)
    return formula + behind[0] if behind else formula


def _formula(text: str) -> tuple[str | None, str]:
    """Returns (the formula between dollar signs or similar delimiters that a text begins with, or None; the rest)."""
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        end = text.find(closing, len(opening))
        if text.startswith(opening) and end > 0 and text[len(opening) : end].strip("\\ "):
            is_price = opening == "$" and re.match(r"\$[\d.,]+\s[^$]*\w\s*\$", text)  # "$18 for one and $20 for ..."
            if not is_price:
                return text[len(opening) : end], text[end + len(closing) :]
    return None, text


def _bare(choice: str) -> str:
    """Returns a choice without LaTeX text commands, and without what precedes its letter, such as "option ("."""
    choice = re.sub(r"\\(?:text|mathrm|mathbf|textbf|textrm)\s*\{([^{}]*)\}", r"\1", choice)
    return re.sub(r"^[\s*$({\[\"'`]*(?:(?:option|choice)\s+[(\[]?)?", "", choice, flags=re.I)


def _letter_of_record(gold: str) -> str | None:
    gold = final_part(gold)
    return None if SEVERAL_CHOICES.match(_bare(gold)) else letter_of(gold)


def letter_of(answer: str) -> str | None:
    """Returns the letter that a marked answer begins with: "B", "(b)", "B. Paris"; None if there is none."""
    answer = _bare(answer)
    match = re.match(r"([A-J])(?!'?\w)(?!(?<=I)\s+[a-z])|([a-j])(?=[\s)\]}.*$'\"]*$|[).:\]]\s)", answer)
    return None if match is None else match[0].upper()


def last_letter_in(text: str) -> str | None:
    """Returns the last choice that a text calls correct, or else names: "(B)", a line that begins with "B", or a
    "B" by itself, but not the words "A" and "I". The whole text may also be the letter, upper or lower case."""
    if re.fullmatch(r"\W*[A-Ja-j]\W*", text, re.A):
        return re.sub(r"\W", "", text, flags=re.A).upper()
    stated = [first or second for first, second in STATED_CHOICE.findall(text)]
    if stated:
        return stated[-1]
    for pattern in (
        r"\(([A-J])\)",
        r"^[\s*]*([A-J])(?=[.):*]|\s*$)",
        r"(?<!\w)(?<!\w')([B-HJ]|[AI](?!\s+[a-z]))(?!'?\w)",
    ):
        # "C, not B" chooses C. re.A: B is by itself in \u7b54\u6848\u662fB
        letters = re.findall(rf"(?<!\bnot )(?<!\bnot \(){pattern}", text, re.M | re.A)
        if letters:
            return letters[-1]
    return None
