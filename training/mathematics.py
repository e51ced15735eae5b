r"""Whether two answers are mathematically the same.

- numbers are compared exactly, as fractions: 1/2 = 0.5 = 50 %, 1,000 = 1000, 1 1/2 = \frac{3}{2}, 1.5e3 = 1500; with
  roots, pi and functions to 9 digits; expressions with variables at three points
- brackets and order of tuples, intervals and matrices matter; sets and lists of solutions have no order
- a name in front (x = 5), currency and units do not matter, but two units that are known to differ do: 5 cm, 5 m
- what is not understood is compared as words; where both are formulas, the package math_verify is asked, if installed
- nothing is ever evaluated by Python, and powers are bounded: 9^{9^{9}} is only not understood
"""

import math
import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 1000  # characters that are read as mathematics
NUMBER = re.compile(
    r"-?\\[dt]?frac\s*\{\d+\}\s*\{\d+\}"
    r"|(?<![\w.])[-\u2212]?[$\u20ac\u00a3]?"
    r"(?:\d+ \d+/\d+|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?)"
    r"|(?<![\w.])[-\u2212]?\.\d+"
)


def last_number_in(text: str) -> str | None:
    numbers = [match[0] for match in NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


Number = Fraction | float


class Scalar(NamedTuple):
    """A number, or an expression: its values at three points, all the same without variables."""

    values: tuple[Number, ...]
    percent: bool = False
    unit: str = ""


class Sequence(NamedTuple):
    """A tuple, an interval, a matrix with its rows in order; which of these, its brackets tell."""

    brackets: str
    items: tuple


class Collection(NamedTuple):
    """A set, a union of intervals, a list of solutions: in any order."""

    items: tuple


class Named(NamedTuple):
    """x = 5"""

    name: str
    value: object


class Equation(NamedTuple):
    """left = right"""

    difference: Scalar


def equal(answer: str, gold: str) -> bool:
    """Whether two answers are mathematically the same, or, if they are not mathematics, the same words."""
    if max(len(answer), len(gold)) > LONGEST:
        return answer.strip() == gold.strip()
    ours, theirs = read(answer), read(gold)
    if _same(ours, theirs):
        return True
    if isinstance(ours, str) and isinstance(theirs, Scalar) and not re.search(r"[<>=\\^_:]", answer):
        numbers = [match[0] for match in NUMBER.finditer(answer)]  # a sentence around a number
        return len(numbers) == 1 and re.search(r"[A-Za-z]{2}", answer) is not None and _same(read(numbers[0]), theirs)
    # neither is understood, and they are mathematics, if not numerals to another base
    unread = isinstance(ours, str) and isinstance(theirs, str) and not re.search(r"\d_", ours + theirs)
    return unread and all(re.search(r"\\[a-zA-Z]|\^", text) for text in (answer, gold)) and _ask(answer, gold)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Named) or isinstance(b, Named):
        if isinstance(a, Named) and isinstance(b, Named):
            return a.name == b.name and _same(a.value, b.value)
        return _same(a.value, b) if isinstance(a, Named) else _same(a, b.value)
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
        negative = Scalar(tuple(-value for value in b.difference.values))
        return _same_scalar(a.difference, b.difference) or _same_scalar(a.difference, negative)
    return a == b


def _same_scalar(a: Scalar, b: Scalar) -> bool:
    if a.unit and b.unit and a.unit in UNITS and b.unit in UNITS and UNITS[a.unit] != UNITS[b.unit]:
        return False
    if a.percent == b.percent:
        return all(map(_close, a.values, b.values))
    percent, plain = (a, b) if a.percent else (b, a)
    if all(_close(x / 100, y) for x, y in zip(percent.values, plain.values)):
        return True
    # a question that asks for a percentage is answered with 50 as well as with 50 %
    return all(_close(x, y) and abs(y) >= 1 for x, y in zip(percent.values, plain.values))


def _close(a: Number, b: Number) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _ask(answer: str, gold: str) -> bool:
    """What the package math_verify says, where it is installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    return bool(verify(parse(f"${gold}$"), parse(f"${answer}$")))


# ----------------------------------------------------------------------------------- reading answers

REPLACED = (
    (r"\\left(?![a-z])\.?|\\right(?![a-z])\.?|\\!|\\displaystyle|\\[bB]igg?[lr]?(?![a-z])|[`\u200b]|\\\$|\$|\*\*", ""),
    (r"(?<!\\)\\[()\[\]]", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad|\u00a0|\u202f", " "),
    (r"\{,\}", ","),
    (r"[\u2212\u2013\u2014]", "-"),
    (r"\\(?:cdot|times|ast)(?![a-z])|[\u00d7\u00b7\u22c5]", "*"),
    (r"\\div(?![a-z])|\u00f7", "/"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])|\u00b0|\u00ba", " degrees"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\%|\u066a", "%"),
    (r"\u03c0", r"\\pi "),
    (r"\u221e|\\infty(?![a-z])|\boo\b|\b[iI]nfinity\b", r"\\infty "),
    (r"\u221a\s*", r"\\sqrt "),
    (r"\u00b2", "^2"),
    (r"\u00b3", "^3"),
    (r"\u00bd", " 1/2"),
    (r"\u00bc", " 1/4"),
    (r"\u00be", " 3/4"),
    (r"\u222a|\\cup(?![a-z])", r"\\cup "),
    (r"\u00b1|\\pm(?![a-z])", r"\\pm "),
    (r"\\(?:emptyset|varnothing)(?![a-z])|\u2205|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\\{", "\x01"),  # the braces of a set; others are LaTeX's own
    (r"\\\}", "\x02"),
)
REPLACED = tuple((re.compile(pattern), new) for pattern, new in REPLACED)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])")
MIXED = re.compile(
    r"(?<![\d.^_/*}])(\d+)\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))|(?<![\d.^_/*])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)"
)
QUANTITY = re.compile(r"(.*[\d)}])(\s*)([A-Za-z][A-Za-z.'/\- ()]*?)(?:\s*\^\s*\{?-?\d\}?)?", re.S)
NAME = re.compile(  # of what is asked: x, x_1, f(2), (x, y), m + n, or words
    r"[A-Za-z]+(?:_\w+)?'?(?:\(\w+(?:,\w+)*\))?|\([A-Za-z](?:,[A-Za-z])*\)|[A-Za-z](?:\+[A-Za-z])+"
)
PROSE = re.compile(
    r"(?<![\\A-Za-z])(?!sqrt|log|sin|cos|tan|exp)[A-Za-z]{4,}|(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}"
)
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
ALIKE = (  # units of two letters or less, and what contradicts them
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
FUNCTIONS = {"ln": math.log, "log": math.log10, "sin": math.sin, "cos": math.cos, "tan": math.tan, "exp": math.exp}
LETTER = re.compile(
    "ell|(?:var)?(?:[Gg]amma|[Dd]elta|epsilon|[Tt]heta|[Ll]ambda|[Xx]i|rho|[Ss]igma|[Pp]hi|[Pp]si|[Oo]mega)|alpha|beta|"
    "zeta|eta|iota|kappa|mu|nu|tau|[Uu]psilon|chi"
)
WORDS = ("sqrt", "pi", *FUNCTIONS)  # that stand for something in plain text, too


def read(text: str) -> object:
    """An answer as a Scalar, Sequence, Collection, Named or Equation, or as a str if it is none of them."""
    for pattern, new in REPLACED:
        text = pattern.sub(new, text)
    text = text.strip().strip("\"'").rstrip(".,;: ").strip()
    try:
        return _read(text, depth=0)
    except (ValueError, ArithmeticError, RecursionError):
        return re.sub(r"[\s{}]|(?<=[a-z])\.$", "", text).lower()


def _read(text: str, depth: int) -> object:
    """Raises ValueError or ArithmeticError for what is not mathematics."""
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
    matrix = re.fullmatch(r"\\begin\{([pbv]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", text, re.S)
    if matrix:
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return Sequence("m", tuple(Sequence("r", tuple(_read(x, depth + 1) for x in row.split("&"))) for row in rows))
    brackets = _brackets(text)
    if brackets:
        parts = _parts(text[1:-1], bracketed=True)
        if brackets == "{}":
            return Collection(tuple(_read(part, depth + 1) for part in parts))
        if len(parts) > 1:
            return Sequence(brackets, tuple(_read(part, depth + 1) for part in parts))
    parts = _parts(text, bracketed=False)
    if len(parts) > 1:
        return Collection(tuple(_read(part, depth + 1) for part in parts))
    if "=" in text and not re.search(r"[<>!]|\\(?:le|ge|ne|lt|gt|approx)", text):
        return _read_equation(text, depth)
    return _read_scalar(text)


def _brackets(text: str) -> str:
    """The brackets around the whole text, {} for a set; "" if there are none."""
    pairs, depth = {"(": ")]", "[": ")]", "\x01": "\x02", "{": "}"}, 0
    if text[0] not in pairs or text[-1] not in pairs[text[0]] or (text[0] == "{" and "," not in text):
        return ""
    for i, character in enumerate(text):
        depth += (character in "([{\x01") - (character in ")]}\x02")
        if depth == 0 and i < len(text) - 1:
            return ""
    return "{}" if text[0] in "{\x01" else text[0] + text[-1]


def _parts(text: str, *, bracketed: bool) -> list[str]:
    """What commas (semicolons, "and", "or") separate outside of brackets. 1,000 has none, but (1,000) is a pair."""
    if bracketed:
        parts = _split(text, r",\s|;|\b(?:and|or)\b")
        if len(parts) > 1 and not any("," in THOUSANDS.sub("", part) for part in parts if _flat(part)):
            return parts
        return _split(text, r",|;")
    spaced = _split(text, r",\s+(?:and\b|or\b)?|;|\b(?:and|or)\b")
    if any("," in THOUSANDS.sub("", part) for part in spaced if _flat(part)):
        return _split(text, r",\s*(?:and\b|or\b)?|;|\b(?:and|or)\b")
    return spaced


def _flat(text: str) -> bool:
    return not re.search(r"[(\[\x01]", text)


def _split(text: str, pattern: str) -> list[str]:
    depth, parts, start = 0, [], 0
    depths = []
    for character in text:
        depth += (character in "([{\x01") - (character in ")]}\x02")
        depths.append(depth)
    for match in re.finditer(pattern, text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _read_equation(text: str, depth: int) -> object:
    left, _, right = text.rpartition("=")
    name = re.sub(r"[\s{}\\]", "", left)
    if NAME.fullmatch(name):
        return Named(name, _read(right, depth + 1))
    if "=" in left:  # a chain of equal things
        left = left.rpartition("=")[2]
    if not re.search(r"[A-Za-z]", re.sub(r"\\[a-z]+", "", left)):
        result = _read(right, depth + 1)
        if not _same(_read(left, depth + 1), result):
            raise ValueError("6 * 7 = 43")
        return result
    values = zip(_read_scalar(left).values, _read_scalar(right).values)
    return Equation(Scalar(tuple(_bounded(a - b) for a, b in values)))


def _read_scalar(text: str) -> Scalar:
    """A number with or without a unit, or an expression."""
    percent = re.fullmatch(r"(.*[\d)}])\s*(?:%|percent\b|per cent\b).*", text, re.S)
    if percent:
        return Scalar(_read_scalar(percent[1]).values, percent=True)
    text = re.sub(r"^([-+]?)\s*(?:[\u20ac\u00a3\u00a5]|USD\s)", r"\1", text)
    quantity = QUANTITY.fullmatch(text)
    if quantity:
        words = re.findall(r"[A-Za-z]+", quantity[3])
        known = [word in UNITS or (len(word) > 2 and bool(quantity[2])) for word in words]
        if all(known or (i and len(word) < 3) for i, (word, known) in enumerate(zip(words, known))) and not (
            set(words) & {*WORDS, "or", "and"}
        ):
            power = MULTIPLES.get(words[0].lower(), 0)
            values = tuple(value * 10**power for value in _read_scalar(quantity[1]).values)
            return Scalar(values, unit=words[0] if words[0] in UNITS and len(words) == 1 else "")
    if (re.fullmatch(r"[A-Za-z\s.'-]{2,}", text) and text not in WORDS) or PROSE.search(text):
        raise ValueError("words")
    text = THOUSANDS.sub(lambda match: re.sub(r"[, ]", "", match[0]), text)
    text = MIXED.sub(_mixed, text)
    return Scalar(tuple(_Expression(text, point).value() for point in range(3)))


def _mixed(match: re.Match) -> str:
    whole, top, bottom = [part for part in match.groups() if part]
    return f"({whole}+{top}/{bottom})"


def _bounded(value: Number) -> Number:
    """Raises ValueError for a number that would take long to calculate with."""
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > 20000:
        raise ValueError("too large")
    return value


class _Expression:
    """A parser that calculates while it reads, with its variables at one of several points."""

    def __init__(self, text: str, point: int):
        self.text, self.point, self.i = text, point, 0

    def value(self) -> Number:
        result = self._sum()
        if self._next():
            raise ValueError(f"not understood: {self.text[self.i :]}")
        return result

    def _next(self) -> str:
        """The next character that is not a space; "" at the end."""
        while self.i < len(self.text) and self.text[self.i].isspace():
            self.i += 1
        return self.text[self.i : self.i + 1]

    def _take(self, character: str) -> bool:
        if self._next() != character:
            return False
        self.i += 1
        return True

    def _expect(self, character: str) -> None:
        if not self._take(character):
            raise ValueError(f"{character} is missing")

    def _match(self, pattern: str) -> re.Match | None:
        self._next()
        match = re.compile(pattern).match(self.text, self.i)
        self.i = match.end() if match else self.i
        return match

    def _sum(self) -> Number:
        result = self._product()
        while self._next() in ("+", "-"):
            sign = 1 if self._take("+") else -1
            self.i += sign < 0
            result = _bounded(result + sign * self._product())
        return result

    def _product(self) -> Number:
        result = self._signed()
        while True:
            if self._take("*"):
                result = _bounded(result * self._signed())
            elif self._take("/"):
                result = _bounded(result / self._signed())
            elif re.match(r"[0-9.A-Za-z({\\]", self._next()):  # 2x, 3(4), 2 \sqrt{3}; 2 3 is nothing
                if re.match(r"[0-9.]", self._next()) and re.match(r"[0-9.]", self.text[: self.i].rstrip()[-1:]):
                    raise ValueError("two numbers side by side")
                result = _bounded(result * self._power())
            else:
                return result

    def _signed(self) -> Number:
        if self._take("-"):
            return -self._signed()
        return self._signed() if self._take("+") else self._power()

    def _power(self) -> Number:
        base = self._atom()
        while self._take("!"):
            if not isinstance(base, Fraction) or base.denominator != 1 or not 0 <= base <= 500:
                raise ValueError("factorial")
            base = Fraction(math.factorial(int(base)))
        return _raise(base, self._signed()) if self._take("^") else base

    def _argument(self) -> Number:
        """Of a LaTeX command: in braces, or one character."""
        if self._take("{"):
            result = self._sum()
            self._expect("}")
            return result
        digit = self._match(r"\d")
        return Fraction(int(digit[0])) if digit else self._atom()

    def _atom(self) -> Number:
        number = self._match(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d+))?(?![_\d])")
        if number:
            exponent = int(number[2] or 0)
            if abs(exponent) > 400 or len(number[1]) > 400:
                raise ValueError("too large")
            return Fraction(number[1]) * Fraction(10) ** exponent
        for opening, closing in ("()", "{}", "[]"):
            if self._take(opening):
                result = self._sum()
                self._expect(closing)
                return result
        name = self._match(r"\\[A-Za-z]+|" + "|".join(WORDS) + r"|[A-Za-z]")
        if name is None:
            raise ValueError(f"not understood: {self.text[self.i :]}")
        return self._named(name[0].lstrip("\\"))

    def _named(self, name: str) -> Number:
        if name == "frac":
            top = self._argument()
            return _bounded(top / self._argument())
        if name == "binom":
            n, k = self._argument(), self._argument()
            if not all(isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= 500 for x in (n, k)):
                raise ValueError("binomial coefficient")
            return Fraction(math.comb(int(n), int(k)))
        if name == "sqrt":
            degree = Fraction(2)
            if self._take("["):
                degree = self._sum()
                self._expect("]")
            return _raise(self._argument(), 1 / degree)
        if name == "pi":
            return math.pi
        if name == "infty":
            return math.inf
        if name in FUNCTIONS:
            base = self._argument() if self._take("_") else None
            result = FUNCTIONS[name](self._power())
            return result if base is None else result / FUNCTIONS[name](base)
        if len(name) > 1 and not LETTER.fullmatch(name):
            raise ValueError(f"not a variable: {name}")
        index = self._match(r"_(?:\{(\w+)\}|(\w))")
        name += f"_{index[1] or index[2]}" if index else ""
        number = int.from_bytes(name.encode(), "big") % 1000003  # another one for another variable
        return Fraction(number + 2 + 17 * self.point, 1013 + 6 * self.point)


def _raise(base: Number, exponent: Number) -> Number:
    """base ** exponent, exactly where that is a fraction."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if size * abs(exponent) > 20000:
                raise ValueError("too large")
            return base ** int(exponent)
        if exponent == Fraction(1, 2) and base >= 0:
            roots = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if (roots[0] ** 2, roots[1] ** 2) == (base.numerator, base.denominator):
                return Fraction(*roots)
    negative_root = base < 0 and isinstance(exponent, Fraction) and exponent.denominator % 2 and exponent.numerator == 1
    result = -((-float(base)) ** float(exponent)) if negative_root else float(base) ** float(exponent)
    if isinstance(result, complex):
        raise ValueError("not a real number")
    return result
