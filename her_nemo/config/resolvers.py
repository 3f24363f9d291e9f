"""The arithmetic resolvers NeMo-Aligner's files use: `${multiply:a,b}`, `${int_div:a,b}`, `${subtract:a,b}`."""

from __future__ import annotations

Number = int | float


def multiply(left: Number, right: Number) -> Number:
    """left * right."""
    return left * right


def int_div(left: int, right: int) -> int:
    """left / right rounded down; ValueError unless right is nonzero."""
    if right == 0:
        raise ValueError(f"int_div: {left} divided by zero")
    return left // right


def subtract(left: Number, right: Number) -> Number:
    """left - right."""
    return left - right


def register() -> None:
    """Make the resolvers known to OmegaConf. Safe to call more than once."""
    from omegaconf import OmegaConf

    for name, function in (("multiply", multiply), ("int_div", int_div), ("subtract", subtract)):
        OmegaConf.register_new_resolver(name, function, replace=True)
