"""Which steps an iteration trains where it trains only some of them: drawn with known probabilities.

A step that is drawn with probability p and whose loss is divided by p adds, on average over the draws, what it would
add if it were always trained (Horvitz and Thompson, JASA 47, 1952). The gradient's variance is smallest where p is in
proportion to the size of the step's gradient; any other p > 0 leaves the average as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def inclusion_probabilities(sizes: Sequence[float], count: int) -> list[Fraction]:
    """Probabilities in proportion to `sizes`, none above 1, whose sum is exactly `count`.

    Args:
        sizes: of each candidate, finite and at least 0; one of size 0 is never drawn.
        count: how many are drawn.

    Raises:
        ValueError: fewer than `count` sizes are positive.
    """
    if sum(size > 0 for size in sizes) < count:
        raise ValueError(f"expected at least {count} positive sizes, got {list(sizes)}")
    exact = [Fraction(size) for size in sizes]
    certain: set[int] = set()
    while True:
        others = [index for index, size in enumerate(exact) if size and index not in certain]
        scale = (count - len(certain)) / sum((exact[index] for index in others), Fraction()) if others else Fraction(0)
        above = {index for index in others if exact[index] * scale >= 1}
        if not above:
            return [Fraction(1) if index in certain else size * scale for index, size in enumerate(exact)]
        certain |= above


def draw_steps(probabilities: Sequence[Fraction], start: float) -> list[int]:
    """As many indices as the probabilities add up to, each drawn with its own: systematic sampling (Madow, 1949).

    The probabilities are laid end to end, and each of the points start, start + 1, ... draws the index that it lies
    in. Their order is such that neighbours tend to be drawn together, as two steps in a row share a state.

    Args:
        probabilities: each in [0, 1], with a whole sum.
        start: uniform in [0, 1).

    Returns:
        The indices, increasing.
    """
    drawn: list[int] = []
    point, total = Fraction(start), Fraction(0)
    for index in sorted(range(len(probabilities)), key=lambda index: index % int(sum(probabilities))):
        total += probabilities[index]
        if point < total:
            drawn.append(index)
            point += 1
    return sorted(drawn)
