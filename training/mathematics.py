r"""Compares two answers mathematically.

- numbers are compared exactly, as fractions: 1/2 = 0.5 = 50 %, 1,000 = 1000, 1 1/2 = \frac{3}{2}, 1.5e3 = 1500; those
  with roots, pi and functions to 9 digits; expressions with variables by their values at three points
- brackets and order matter in tuples, intervals and matrices; sets and lists of solutions have no order
- x > 5 is the interval (5, \infty); equations are equal if one is a multiple of the other
- a name in front (x = 5), currency and units are ignored, but two known units that differ are not equal: 5 cm, 5 m
- answers that cannot be parsed are compared as words, and if both are formulas, also with math_verify, if installed
- Python never evaluates an answer, and powers are bounded: 9^{9^{9}} merely fails to parse
"""

import itertools
import math
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from training.expressions import WORDS, Number, bounded, value_of

LONGEST = 1000  # characters; longer answers are compared as text
OTHER_SCRIPTS = "\u0400-\u0e7f\u2e80-\uffef"  # scripts other than Latin and Greek, whose letters may be variables
# No Latin letter before a number, which would make both one word; Chinese characters may stand there.
NO_WORD = r"(?<![0-9A-Za-z_\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u0dff.])"
NUMBER = re.compile(
    r"-?\\[dt]?frac\s*(?:\{-?\d+\}|\d)\s*(?:\{-?\d+\}|\d)"
    rf"|{NO_WORD}[-\u2212]?[$\u20ac\u00a3]?"
    r"(?:\d+ \d+/\d+|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+|[eE][-+]?\d+(?!\w))?(?:\s?\\?%)?)"
    rf"|{NO_WORD}[-\u2212]?\.\d+"
)


def last_number_in(text: str) -> str | None:
    numbers = [match[0] for match in NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


class Scalar(NamedTuple):
    """A number or an expression, as its values at three points, which are equal without variables."""

    values: tuple[Number, ...]
    percent: bool = False
    unit: str = ""


class Sequence(NamedTuple):
    """A tuple, an interval, or a matrix with its rows; the brackets tell which."""

    brackets: str
    items: tuple


class Collection(NamedTuple):
    """A set, a union of intervals or a list of solutions, without order."""

    items: tuple


class Named(NamedTuple):
    """x = 5"""

    name: str
    value: object


class Equation(NamedTuple):
    """left = right"""

    difference: tuple[Number, ...]  # left - right at the three points


def equal(answer: str, gold: str) -> bool:
    """Returns whether two answers are mathematically equal, or the same words if they are not mathematics."""
    if max(len(answer), len(gold)) > LONGEST:
        return answer.strip() == gold.strip()
    ours, theirs = read(answer), read(gold)
    if _same(ours, theirs):
        return True
    bare = [UNIT_OF_LETTERS.sub("", text) for text in (answer, gold)]
    if (bare[0] == answer) != (bare[1] == gold) and _same(*map(read, bare)):
        return True
    plain = _plain(answer)
    if isinstance(ours, str) and isinstance(theirs, Scalar) and not re.search(NOT_THE_NUMBER, plain):
        numbers = [match[0] for match in NUMBER.finditer(plain)]  # a sentence around a number
        in_words = re.search(rf"[A-Za-z]{{2}}|[{OTHER_SCRIPTS}]", plain) is not None
        return len(numbers) == 1 and in_words and _same(read(numbers[0]), theirs)
    # neither could be parsed: ask math_verify if both look like formulas and are no numerals in another base
    unread = isinstance(ours, str) and isinstance(theirs, str) and not re.search(r"\d_", ours + theirs)
    return unread and all(re.search(r"\\[a-zA-Z]|\^", text) for text in (answer, gold)) and _ask(answer, gold)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Named) or isinstance(b, Named):
        if isinstance(a, Named) and isinstance(b, Named):
            if a.name == b.name:
                return _same(a.value, b.value)
            a, b = _as_equation(a), _as_equation(b)  # x = y, y = x
            return isinstance(a, Equation) and isinstance(b, Equation) and _same(a, b)
        named, other = (a, b) if isinstance(a, Named) else (b, a)
        value = _as_equation(named) if isinstance(other, Equation) else named.value
        return value is not named and _same(value, other)
    if type(a) is not type(b):
        return False
    if isinstance(a, Scalar):
        return _same_scalar(a, b)
    if isinstance(a, Sequence):
        return a.brackets == b.brackets and len(a.items) == len(b.items) and all(map(_same, a.items, b.items))
    if isinstance(a, Collection):
        return all(any(_same(x, y) for y in b.items) for x in a.items) and all(
            any(_same(x, y) for x in a.items) for y in b.items
        )
    if isinstance(a, Equation):
        x, y = a.difference, b.difference
        if not any(x) or not any(y):  # 2 x = 2 x, true everywhere
            return not any(x) and not any(y)
        return all(x) and all(y) and all(_close(p / x[0], q / y[0]) for p, q in zip(x, y))
    return a == b


def _as_equation(named: Named) -> object:
    """Returns y = 2 x or x + y = 3 as an Equation of variables; returns `named` itself if its name is no variable."""
    if not re.fullmatch(r"[A-Za-z](_\w)?(\+[A-Za-z])*", named.name) or not isinstance(named.value, Scalar):
        return named
    return Equation(tuple(value_of(named.name, i) - value for i, value in enumerate(named.value.values)))


def _same_scalar(a: Scalar, b: Scalar) -> bool:
    if a.unit and b.unit and a.unit in UNITS and b.unit in UNITS and UNITS[a.unit] != UNITS[b.unit]:
        return False
    if a.percent == b.percent:
        return all(map(_close, a.values, b.values))
    percent, plain = (a, b) if a.percent else (b, a)
    if all(_close(x / 100, y) for x, y in zip(percent.values, plain.values)):
        return True
    # a question for a percentage may be answered with 50 or 50 %
    return all(_close(x, y) and abs(y) >= 1 for x, y in zip(percent.values, plain.values))


def _close(a: Number, b: Number) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    # next to 0 floats are what rounding has left; a fraction is what it is, however small
    is_exact = any(isinstance(x, Fraction) and x for x in (a, b))
    try:
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=0.0 if is_exact else 1e-12)
    except OverflowError:  # a fraction beyond all floats
        return False


def _ask(answer: str, gold: str) -> bool:
    """Returns the verdict of the package math_verify, or False if it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(f"${gold}$"), parse(f"${answer}$")))


# ----------------------------------------------------------------------------------- reading answers

WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width ASCII to ASCII
REPLACED = (
    (r"^\s*\$?\s*\\\$\s*([\d.,!{}\\]*\d)\s*\$?\s*$", r"\1 dollars"),
    (r"(?<=\d)\s*\u00a2", " cents"),
    (r"(?<![\w'])(?:[nN]egative|[mM]inus)\s+(?=[$\\(]{0,2}\d)", "-"),
    (r"\\left(?![a-z])\.?|\\right(?![a-z])\.?|\\!|\\displaystyle|\\[bB]igg?[lr]?(?![a-z])|[`\u200b]|\\\$|\$", ""),
    # the power in 2**10; other double stars are Markdown's
    (r"(?<![A-Za-z][A-Za-z])(?<=[\w)}])\*\*(?=-?[\d({]|[A-Za-z](?![A-Za-z]))", "^"),
    (r"\*\*", ""),
    (r"(?<!\\)\\[()\[\]]", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad|\u00a0|\u202f", " "),
    (r"\{,\}", ","),
    (r"[\u2212\u2013\u2014]", "-"),
    (r"\\(?:cdot|times|ast)(?![a-z])|[\u00d7\u00b7\u22c5]|(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
    (r"\\div(?![a-z])|\u00f7", "/"),
    (r"\\[dtc](frac|binom)(?![a-z])", r"\\\1"),
    (
        r"\\(sin|cos|tan)\s*[({]?\s*(\d+)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])|\u00b0)\s*[)}]?",
        r"\\\1(\2\\pi/180)",
    ),
    (r"\{((?:[^{}]|\{[^{}]*\})*)\\over(?![a-z])((?:[^{}]|\{[^{}]*\})*)\}", r"\\frac{\1}{\2}"),
    (r"\{?\s*(\w+)\s*\\choose\s*(\w+)\s*\}?", r"\\binom{\1}{\2}"),
    (r"\\[lr]?vert(?![a-z])", "|"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])|\u00b0|\u00ba", " degrees"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|boldsymbol|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)\s+an?\s+(?=[a-z]{3,}\s*$)", " per "),  # 12 a day
    (r"\\mathbb\s*\{?\s*R\b\s*\}?(?!\s*[\^_])|\u211d(?!\s*[\^_])|\b[aA]ll real numbers\b", r"(-\\infty,\\infty)"),
    (r"\\%|\u066a", "%"),
    (r"\u03c0", r"\\pi "),
    (r"\u221e|\\infty(?![a-z])|\boo\b|\b[iI]nfinity\b", r"\\infty "),
    (r"\u221a\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
    (r"\u221a\s*", r"\\sqrt "),
    (r"[\u207b\u207a]?[\u00b2\u00b3\u00b9\u2070-\u2079]+", lambda match: f"^{{{_compatible(match[0])}}}"),
    (r"[\u2080-\u2089]+", lambda match: f"_{{{_compatible(match[0])}}}"),
    (r"[\u00bc-\u00be\u2150-\u215e]", lambda match: " " + _compatible(match[0])),
    (r"\u222a|\\cup(?![a-z])", r"\\cup "),
    (r"\u2208", r"\\in "),
    (r"\u00b1|\\pm(?![a-z])", r"\\pm "),
    (r"\\(?:emptyset|varnothing)(?![a-z])|\u2205|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\\{", "\x01"),  # braces of a set; plain braces are LaTeX's own
    (r"\\\}", "\x02"),
)
REPLACED = tuple((re.compile(pattern), new) for pattern, new in REPLACED)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])")
MIXED = re.compile(
    r"(?<![\d.^_/*}])(\d+)\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))|(?<![\d.^_/*])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)"
)
QUANTITY = re.compile(r"(.*(?:[\d)}]|\\pi(?![a-z])))(\s*)([A-Za-z][A-Za-z.'/\- ()]*?)(?:\s*\^\s*\{?-?\d\}?)?", re.S)
EXPRESSION = re.compile(  # a letter after this is a variable, not a unit: 3 \pi h, 3 + 2 m, x^2 m
    r"\\pi$|(?<=[^\s({eE])\s*[-+]\s*\d+(?:\.\d+)?$|(?<![\\A-Za-z])(?![eE][-+]?\d)[A-Za-z](?![A-Za-z])"
)
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{\s*(\d+)\s*\}")
RELATION = re.compile(r"(<=|>=|[<>\u2264\u2265]|\\(?:le|ge|leq|geq|lt|gt)(?:slant)?(?![a-z]))")
NAME = re.compile(  # name of the quantity asked for: x, x_1, f(2), f^{-1}(x), |A|, (x, y), m + n, or words
    r"[A-Za-z]+(?:_\w+)?'?(?:\(\w+(?:,\w+)*\))?|[A-Za-z]\^-1\(\w+\)|\|[A-Z]+\||\([A-Za-z](?:,[A-Za-z])*\)|[A-Za-z](?:\+[A-Za-z])+"
)
PROSE = re.compile(
    r"(?<![\\A-Za-z])(?!sqrt|log|sin|cos|tan|exp)[A-Za-z]{4,}|(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}"
)
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
ALIKE = (  # one unit per line: those of at most two letters, and others that must not equal them
    "mm millimeter millimeters",
    "cm centimeter centimeters",
    "m meter meters",
    "km kilometer kilometers",
    "in inch inches",
    "ft foot feet",
    "yd yard yards",
    "mi mile miles",
    "mg",
    "g gram grams",
    "kg kilogram kilograms",
    "lb lbs pound pounds",
    "oz ounce ounces",
    "pt pint pints",
    "qt quart quarts",
    "ml mL",
    "L l liter liters",
    "s sec second seconds",
    "min minute minutes",
    "h hr hrs hour hours",
    "day days",
    "week weeks",
    "month months",
    "year years",
    "cent cents",
    "dollar dollars USD",
)
UNITS = {word: group for group in ALIKE for word in group.split()}
PARTS = ("half", "halves", "third", "thirds", "fourth", "fourths", "fifths", "tenths", "factorial")
# 5 squared, or 5 squared in all; 25 squared cm are an area
POWER = rf"(?:squared|cubed)\b(?!\s+(?:(?:units?|{'|'.join(sorted(UNITS.keys() - {'in'}))})\b|in\W*$))"
NOT_THE_NUMBER = re.compile(  # a formula; 3 fourths; 3 and a half; at least 3
    rf"[<>=\\^_:]|\d[\s-]+(?:and an? )?(?:(?:{'|'.join(PARTS)})\b|{POWER})"
    r"|\b(?:than|at least|at most|not)\b\W*\d",
    re.I,
)
UNIT_OF_LETTERS = re.compile(  # 10\text{ N} or 18^{\text{th}}; but not an i, e or d, nor "or"
    r"(?<=[\d}])(?:\s|~|\\[,;: ])*(?:\\(?:text|mathrm|mbox)\s*\{\s*"
    r"(?:[NJWVACFKT]|Pa|Hz|k[NJWVg]|m[AV]|M[WJ]|eV|[ap]m|st|nd|rd|th|Rs)\s*\}"
    r"|\^\s*\{\s*\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\})(?=\s*(?:[,;.)\]}]|$))"
)


def _compatible(text: str) -> str:
    """Rewrites superscripts, subscripts and single-character fractions with plain digits."""
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("\u2212", "-")


def _plain(text: str) -> str:
    """Normalises an answer: replaces LaTeX markup, Unicode characters and notations of other languages."""
    text = text.translate(WIDE)
    for pattern, new in REPLACED:
        text = pattern.sub(new, text)
    return text


def read(text: str) -> object:
    """Parses an answer into a Scalar, Sequence, Collection, Named or Equation; returns a str if it is none of them."""
    text = _plain(text).strip().strip("\"'").rstrip(".,;: \u3002\uff0c\uff1b").strip()
    try:
        return _read(text, depth=0)
    except (ValueError, ArithmeticError, RecursionError):
        return re.sub(r"[\s{}]|(?<=[a-z])\.$", "", text).lower()


def _read(text: str, depth: int) -> object:
    """Parses a normalised answer. Raises ValueError or ArithmeticError if it is not mathematics."""
    text = text.strip()
    if not text or depth > 5:
        raise ValueError
    member = re.fullmatch(r"(\w+)\s*\\in\b(.+)", text, re.S)
    if member:
        return Named(member[1], _read(member[2], depth + 1))
    if "\\pm" in text:
        return Collection(tuple(_read(text.replace("\\pm", sign, 1), depth + 1) for sign in "+-"))
    if "\\cup" in text:
        return Collection(tuple(_read(part, depth + 1) for part in text.split("\\cup")))
    matrix = re.fullmatch(
        r"[(\[]?\s*\\begin\{([pbv]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}\s*[)\]]?", text, re.S
    )
    if matrix:
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        kind = "|" if matrix[1] == "vmatrix" else "m"  # a determinant, not a matrix
        return Sequence(kind, tuple(Sequence("r", tuple(_read(x, depth + 1) for x in row.split("&"))) for row in rows))
    brackets = _brackets(text)
    if brackets:
        parts = _parts(text[1:-1], bracketed=True)
        if brackets == "{}":
            return Collection(tuple(_read(part, depth + 1) for part in parts))
        if len(parts) > 1:
            return Sequence(brackets, tuple(_read(part, depth + 1) for part in parts))
    parts = _parts(text, bracketed=False)
    if len(parts) > 1:
        items = tuple(_read(part, depth + 1) for part in parts)
        both = len(parts) == 2 and re.search(r"\band\b", text) and all(map(RELATION.search, parts))
        return (_intersection(*items) if both else None) or Collection(items)
    if RELATION.search(text):
        return _read_inequality(text, depth)
    if "=" in text and not re.search(r"[<>!]|\\(?:le|ge|ne|lt|gt|approx)", text):
        return _read_equation(text, depth)
    return _read_scalar(text)


def _brackets(text: str) -> str:
    """Returns the brackets around the whole text, {} for a set, "" if there are none."""
    pairs = {"(": ")]", "[": ")]", "\x01": "\x02", "{": "}"}
    if text[0] not in pairs or text[-1] not in pairs[text[0]] or (text[0] == "{" and "," not in text):
        return ""
    if 0 in _depths(text)[:-1]:
        return ""
    return "{}" if text[0] in "{\x01" else text[0] + text[-1]


def _parts(text: str, *, bracketed: bool) -> list[str]:
    """Splits at commas (semicolons, "and", "or") outside brackets. 1,000 is one part, but (1,000) is a pair."""
    if bracketed:
        parts = _split(text, r",\s|;|\b(?:and|or)\b")
        if len(parts) > 1 and not any("," in THOUSANDS.sub("", part) for part in parts if _flat(part)):
            return parts
        return _split(text, r",|;")
    spaced = _split(text, r",\s+(?:and\b|or\b)?|(?<=[)\]]),|;|\b(?:and|or)\b")
    if any("," in THOUSANDS.sub("", part) for part in spaced if _flat(part)):
        return _split(text, r",\s*(?:and\b|or\b)?|;|\b(?:and|or)\b")
    return spaced


def _flat(text: str) -> bool:
    return not re.search(r"[(\[\x01]", text)


def _depths(text: str) -> list[int]:
    """Returns how many brackets are open after each character."""
    return list(itertools.accumulate((c in "([{\x01") - (c in ")]}\x02") for c in text))


def _split(text: str, pattern: str) -> list[str]:
    parts, start, depths = [], 0, _depths(text)
    for match in re.finditer(pattern, text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _read_inequality(text: str, depth: int) -> Named:
    """Parses x < 5, 5 > x or 1 < x < 5 into a variable and its interval."""
    sides = RELATION.split(text)
    signs = ["<" if re.search(r"<|\u2264|\\l", sign) else ">" for sign in sides[1::2]]
    closed = [re.search(r"=|[\u2264\u2265]|\\[lg]e", sign) is not None for sign in sides[1::2]]
    variable = re.compile(r"\s*(?!\\?(?:pi|infty)\b)\\?[A-Za-z]+(?:_\w)?\s*")
    values = [None if variable.fullmatch(side) else side for side in sides[::2]]
    if len({*signs}) > 1 or values.count(None) != 1 or values[1:-1] not in ([], [None]):
        raise ValueError("not the bounds of a variable")
    name = re.sub(r"[\s\\]", "", sides[2 * values.index(None)])
    if len(values) == 2:  # the bound on the variable's side is missing
        values, closed = [values[0], None, values[1]], [closed[0]] * 2
        missing = 0 if values[0] is None else 2
        values[missing], closed[missing // 2] = "-\\infty" if (signs[0] == "<") == (missing == 0) else "\\infty", False
    bounds = [_read(values[i], depth + 1) for i in (0, 2)]
    if signs[0] == ">":
        bounds, closed = bounds[::-1], closed[::-1]
    if not all(isinstance(bound, Scalar) and len({*bound.values}) == 1 for bound in bounds):
        raise ValueError("the bounds are no numbers")
    return Named(name, Sequence(("[" if closed[0] else "(") + ("]" if closed[1] else ")"), tuple(bounds)))


def _intersection(a: object, b: object) -> Named | None:
    """x > 2 and x < 3: the interval that is in both; None if there is none, so that both are meant."""
    if not (isinstance(a, Named) and isinstance(b, Named) and a.name == b.name):
        return None
    low = max((x.items[0].values[0], x.brackets[0] == "(", x.items[0]) for x in (a.value, b.value))
    high = min((x.items[1].values[0], x.brackets[1] == "]", x.items[1]) for x in (a.value, b.value))
    return Named(a.name, Sequence("[("[low[1]] + ")]"[high[1]], (low[2], high[2]))) if low[0] < high[0] else None


def _read_equation(text: str, depth: int) -> object:
    left, _, right = text.rpartition("=")
    name = re.sub(r"[\s{}\\]", "", left)
    if NAME.fullmatch(name):
        return Named(name, _read(right, depth + 1))
    if "=" in left:  # a chain of equalities
        left = left.rpartition("=")[2]
    if not re.search(r"[A-Za-z]", re.sub(r"\\[a-z]+", "", left)):
        result = _read(right, depth + 1)
        if not _same(_read(left, depth + 1), result):
            raise ValueError("6 * 7 = 43")
        return result
    values = zip(_read_scalar(left).values, _read_scalar(right).values)
    return Equation(tuple(bounded(a - b) for a, b in values))


def _read_scalar(text: str) -> Scalar:
    """Parses a number with or without a unit, or an expression."""
    percent = re.fullmatch(r"(.*[\d)}])\s*(?:%|percent\b|per cent\b).*", text, re.S)
    if percent:
        return Scalar(_read_scalar(percent[1]).values, percent=True)
    text = re.sub(r"^([-+]?)\s*(?:[\u20ac\u00a3\u00a5\u20b9]|USD\s|Rs\.?\s*(?=\d))", r"\1", text)
    text = re.sub(r"(?<=\d)\s*[\u20ac\u00a3\u00a5\u20b9]$", "", text)
    quantity = QUANTITY.fullmatch(text)
    if quantity:
        words = re.findall(r"[A-Za-z]+", quantity[3])
        known = [word in UNITS or (len(word) > 2 and bool(quantity[2])) for word in words]
        is_unit = all(known or (i and len(word) < 3) for i, (word, known) in enumerate(zip(words, known)))
        alone = len(words) == 1 or ("/" in quantity[3] and all(word in UNITS for word in words))  # m or m/s, not m x
        is_variable = len(words[0]) == 1 and (not alone or EXPRESSION.search(quantity[1]))
        is_part = not {word.lower() for word in words}.isdisjoint(PARTS) or re.match(POWER, quantity[3], re.I)
        if is_unit and not is_variable and not is_part and not set(words) & {*WORDS, "or", "and"}:
            power = MULTIPLES.get(words[0].lower(), 0)
            values = tuple(value * 10**power for value in _read_scalar(quantity[1]).values)
            return Scalar(values, unit=words[0] if words[0] in UNITS and len(words) == 1 else "")
    if (re.fullmatch(r"[A-Za-z\s.'-]{2,}", text) and text not in WORDS) or PROSE.search(text):
        raise ValueError("words")
    text = THOUSANDS.sub(lambda match: re.sub(r"[, ]", "", match[0]), text)
    text = MIXED.sub(_mixed, REPEATING.sub(_repeating, text))
    return Scalar(tuple(value_of(text, point) for point in range(3)))


def _repeating(match: re.Match) -> str:
    """Rewrites 0.1\\overline{6} as a fraction."""
    whole, once, again = match.groups()
    return f"({int(whole + once + again) - int((whole + once) or 0)}/{10 ** len(once + again) - 10 ** len(once)})"


def _mixed(match: re.Match) -> str:
    whole, top, bottom = [part for part in match.groups() if part]
    return f"({whole}+{top}/{bottom})"
