# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the largest batch or sequence whose memory fits, with few simulations."""

from collections.abc import Callable


# a search along a slope needs about three simulations; it ends when this share of the memory is used
MOST_TRIES, ENOUGH = 8, 0.98


def largest(needs: Callable[[int], int], memory: float, limit: int, start: int = 1) -> int:
    """Returns the largest number from 1 to `limit` that fits, or a number that takes 98 % of the memory.

    The search follows the slope between the last two simulations, because memory grows almost in proportion. The number
    that it returns was simulated, and fits.

    Args:
        needs: returns the bytes for a number; it must not fall.
        memory: bytes that there are.
        limit: largest number to consider.
        start: a number for which `needs` is already known, or cheap.

    Returns:
        The number; 0 if not even 1 fits.
    """
    fits, fails = 0, limit + 1
    last, last_need, guess = 0, 0, min(start, limit)
    for tries in range(MOST_TRIES):
        need = needs(guess)
        fits, fails = (guess, fails) if need <= memory else (fits, guess)
        if fails - fits <= 1 or ENOUGH * memory <= need <= memory:
            break
        slope = (need - last_need) / (guess - last) if tries else 0
        step = int((memory - need) // slope) if slope > 0 else guess
        last, last_need = guess, need
        guess = min(max(last + step, fits + 1), fails - 1)
    return fits
