"""Which answers may be handed to a scorer that evaluates them.

Some reasoning-gym scorers call `eval` or SymPy's `parse_expr` (which calls `eval`) on the answer.
What a model wrote must never be run, so only texts that cannot do anything get that far:

- for `eval`: JSON or Python literals, and texts without calls, attributes, subscripts of names,
  powers or names with underscores (an answer `oracle_answer` would otherwise read the solution);
- for `parse_expr`: arithmetic over numbers, single letters and elementary functions, small powers.

This says nothing about whether an answer is right.
"""

from __future__ import annotations

import ast
import json
import re

MAX_LENGTH = 2000
MAX_POWER = 100
MAX_DIGITS = 30

_FUNCTIONS = frozenset(
    [
        *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan"),
        *("sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt"),
    ]
)
_NAMES = frozenset([*"abcdfghjklmnopqrstuvwxyz", "C", "X", "pi", "e"])  # X: simple_integration's
_PLAIN = re.compile(r"[A-Za-z0-9_\s,;:'\"\[\]#|+-]*")
_RISKY = re.compile(r"[\w'\"\]]\s*\[|[A-Za-z0-9]_|_[A-Za-z0-9]|__")
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.UAdd, ast.USub)


def is_plain(text: str) -> bool:
    """Whether evaluating `text` could do nothing but make a value or fail."""
    if len(text) > MAX_LENGTH:
        return False
    return _is_literal(text) or (bool(_PLAIN.fullmatch(text)) and not _RISKY.search(text))


def is_formula(text: str) -> bool:
    """Whether `parse_expr(text)` could do nothing but make a small symbolic expression or fail."""
    if len(text) > MAX_LENGTH:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _is_formula(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_literal(text: str) -> bool:
    for read in (json.loads, ast.literal_eval):
        try:
            read(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return True
    return False


def _is_formula(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=int() | float() as value):
            return len(str(value)) <= MAX_DIGITS
        case ast.Name(id=name):
            return name in _NAMES
        case ast.UnaryOp(op=operator, operand=operand):
            return isinstance(operator, _OPERATORS) and _is_formula(operand)
        case ast.BinOp(left=base, op=ast.Pow(), right=power):
            return _is_formula(base) and _is_formula(power) and _is_small_power(base, power)
        case ast.BinOp(left=left, op=operator, right=right):
            return isinstance(operator, _OPERATORS) and _is_formula(left) and _is_formula(right)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return name in _FUNCTIONS and _is_formula(argument)
    return False


def _is_small_power(base: ast.expr, power: ast.expr) -> bool:
    """A written number or fraction up to MAX_POWER; powers of powers grow without bound."""
    if any(isinstance(node, ast.Pow) for node in ast.walk(base)):
        return False
    while isinstance(power, ast.UnaryOp):
        power = power.operand
    parts = [power.left, power.right] if isinstance(power, ast.BinOp) else [power]
    if isinstance(power, ast.BinOp) and not isinstance(power.op, ast.Div):
        return False
    return all(
        isinstance(part, ast.Constant)
        and isinstance(part.value, (int, float))
        and part.value <= MAX_POWER
        for part in parts
    )
