"""The value of an arithmetic expression that a model wrote, without evaluating it as code.

Grammar (recursive descent, exact fractions):

    sum     = product (("+" | "-") product)*
    product = atom (("*" | "/") atom)*
    atom    = integer | "(" sum ")"

Signs before a number, decimals, powers and everything else are refused. Length and nesting are
bounded, so that no text costs more than microseconds.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 200
MAX_DEPTH = 20

_TOKEN = re.compile(r"\s*(?:([0-9]{1,12})|([-+*/()]))")


class ExpressionError(ValueError):
    """The text is no expression of the grammar, or divides by zero."""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of `text` and the integers in it, in order of appearance.

    Raises ExpressionError, which says what is wrong and where.
    """
    parser = _Parser(_tokens(text))
    value = parser.sum(0)
    if parser.place < len(parser.tokens):
        raise ExpressionError(f"unexpected {parser.tokens[parser.place]!r} after the expression")
    return value, [int(token) for token in parser.tokens if token.isdigit()]


def _tokens(text: str) -> list[str]:
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters; at most {MAX_LENGTH} are read")
    tokens: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            place += len(text[place:]) - len(text[place:].lstrip())
            raise ExpressionError(f"unexpected {text[place]!r} at character {place + 1}")
        tokens.append(match.group(1) or match.group(2))
        place = match.end()
    if not tokens:
        raise ExpressionError("the expression is empty")
    return tokens


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.place = 0

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self._next_is("+-"):
            operator = self._take()
            right = self._product(depth)
            value = value + right if operator == "+" else value - right
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._atom(depth)
        while self._next_is("*/"):
            operator = self._take()
            right = self._atom(depth)
            if operator == "/" and right == 0:
                raise ExpressionError("division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def _atom(self, depth: int) -> Fraction:
        if self.place == len(self.tokens):
            raise ExpressionError("the expression ends where a number was expected")
        token = self._take()
        if token.isdigit():
            return Fraction(int(token))
        if token != "(" or depth >= MAX_DEPTH:
            raise ExpressionError(f"unexpected {token!r} where a number was expected")
        value = self.sum(depth + 1)
        if not self._next_is(")"):
            raise ExpressionError("a parenthesis is not closed")
        self._take()
        return value

    def _next_is(self, tokens: str) -> bool:
        return self.place < len(self.tokens) and self.tokens[self.place] in tokens

    def _take(self) -> str:
        self.place += 1
        return self.tokens[self.place - 1]
