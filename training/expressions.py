r"""Evaluates expressions in LaTeX or plain text while parsing them: numbers exactly, as fractions; roots, pi and
functions as floats; variables at one of three points. Nothing is passed to Python's eval, and expressions that would
take long to evaluate are refused."""

import hashlib
import math
import re
from fractions import Fraction

Number = Fraction | float
FUNCTIONS = {"ln": math.log, "log": math.log10, "sin": math.sin, "cos": math.cos, "tan": math.tan, "exp": math.exp}
LETTER = re.compile(
    "ell|(?:var)?(?:[Gg]amma|[Dd]elta|epsilon|[Tt]heta|[Ll]ambda|[Xx]i|rho|[Ss]igma|[Pp]hi|[Pp]si|[Oo]mega)|alpha|beta|"
    "zeta|eta|iota|kappa|mu|nu|tau|[Uu]psilon|chi"
)
WORDS = ("sqrt", "pi", *FUNCTIONS)  # names that are read without a backslash, too
FACTOR = re.compile(rf"\\(?:pi|{LETTER.pattern})(?![A-Za-z])|(?!{'|'.join({*WORDS} - {'pi'})})[A-Za-z]")  # of 2 \pi x
FUNCTIONS |= {  # only in LaTeX: in plain text sec is a second
    "arcsin": math.asin,
    "arccos": math.acos,
    "arctan": math.atan,
    "cot": lambda x: 1 / math.tan(x),
    "sec": lambda x: 1 / math.cos(x),
    "csc": lambda x: 1 / math.sin(x),
}


def bounded(value: Number) -> Number:
    """Returns value. Raises ValueError if it has so many digits that calculating with it would take long."""
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > 20000:
        raise ValueError("too large")
    return value


def value_of(text: str, point: int) -> Number:
    """Returns the value of an expression with its variables at one of three points, 0 to 2. Raises ValueError or
    ArithmeticError if text cannot be evaluated."""
    return _Expression(text, point).value()


class _Expression:
    """A recursive-descent parser that evaluates while it parses."""

    def __init__(self, text: str, point: int):
        self.text, self.point, self.i = text, point, 0
        self.has_variables = False

    def value(self) -> Number:
        result = self._sum()
        if self._next():
            raise ValueError(f"not understood: {self.text[self.i :]}")
        return result

    def _next(self) -> str:
        """Skips spaces and returns the next character, "" at the end."""
        while self.i < len(self.text) and self.text[self.i].isspace():
            self.i += 1
        return self.text[self.i : self.i + 1]

    def _take(self, character: str) -> bool:
        if self._next() != character:
            return False
        self.i += 1
        return True

    def _sum_until(self, closing: str) -> Number:
        """Parses a sum and the bracket that closes it."""
        result = self._sum()
        if not self._take(closing):
            raise ValueError(f"{closing} is missing")
        return result

    def _match(self, pattern: str) -> re.Match | None:
        self._next()
        match = re.compile(pattern).match(self.text, self.i)
        self.i = match.end() if match else self.i
        return match

    def _sum(self) -> Number:
        result = self._product()
        while sign := self._match("[-+]"):
            term = self._product()
            result = bounded(result + term if sign[0] == "+" else result - term)
        return result

    def _product(self) -> Number:
        result = self._signed()
        while True:
            if self._take("*"):
                result = bounded(result * self._signed())
            elif self._take("/"):
                result = bounded(result / self._signed())
            elif re.match(r"[0-9.A-Za-z({\\]", self._next()):  # 2x, 3(4), 2 \sqrt{3}; not 2 3
                if re.match(r"[0-9.]", self._next()) and re.match(r"[0-9.]", self.text[: self.i].rstrip()[-1:]):
                    raise ValueError("two numbers side by side")
                result = bounded(result * self._power())
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
        """Parses the argument of a LaTeX command: in braces, one digit, or one symbol."""
        if self._take("{"):
            return self._sum_until("}")
        digit = self._match(r"\d")
        return Fraction(int(digit[0])) if digit else self._atom()

    def _of_function(self) -> Number:
        """Parses the argument of a function such as sin: in brackets, or all factors before a bracket or function."""
        is_product = self._next() not in ("(", "[", "{", "|")
        result = self._power()
        while is_product and self._next() and FACTOR.match(self.text, self.i):
            result = bounded(result * self._power())
        return result

    def _atom(self) -> Number:
        number = self._match(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d+))?(?![_\d])")
        if number:
            exponent = int(number[2] or 0)
            if abs(exponent) > 400 or len(number[1]) > 400:
                raise ValueError("too large")
            return Fraction(number[1]) * Fraction(10) ** exponent
        if self._take("|"):
            result = self._sum_until("|")
            if self.has_variables:  # variables are positive at all points, so |x| would equal x
                raise ValueError("the absolute value of a variable")
            return abs(result)
        for opening, closing in ("()", "{}", "[]"):
            if self._take(opening):
                return self._sum_until(closing)
        name = self._match(r"\\[A-Za-z]+|" + "|".join(WORDS) + r"|[A-Za-z]")
        if name is None:
            raise ValueError(f"not understood: {self.text[self.i :]}")
        return self._named(name[0].lstrip("\\"))

    def _named(self, name: str) -> Number:
        if name == "frac":
            top = self._argument()
            return bounded(top / self._argument())
        if name == "binom":
            n, k = self._argument(), self._argument()
            if not all(isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= 500 for x in (n, k)):
                raise ValueError("binomial coefficient")
            return Fraction(math.comb(int(n), int(k)))
        if name == "sqrt":
            degree = self._sum_until("]") if self._take("[") else Fraction(2)
            return _raise(self._argument(), 1 / degree)
        if name == "pi":
            return math.pi
        if name == "infty":
            return math.inf
        if name in FUNCTIONS:
            base = self._argument() if self._take("_") else None
            exponent = self._argument() if self._take("^") else Fraction(1)
            if exponent == -1:
                raise ValueError("an inverse function, or a reciprocal")
            result = FUNCTIONS[name](self._of_function())
            return _raise(result if base is None else result / FUNCTIONS[name](base), exponent)
        if len(name) > 1 and not LETTER.fullmatch(name):
            raise ValueError(f"not a variable: {name}")
        self.has_variables = True
        index = self._match(r"_(?:\{(\w+)\}|(\w))")
        name += f"_{index[1] or index[2]}" if index else ""
        # Pseudo-random values, so that no variable is a simple combination of others by chance: a + d is not b + c.
        number = int.from_bytes(hashlib.blake2b(f"{name} {self.point}".encode(), digest_size=4).digest(), "big")
        return Fraction(1025 + number % 3072, 4099)


def _raise(base: Number, exponent: Number) -> Number:
    """Returns base ** exponent, exactly if the result is a fraction."""
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
