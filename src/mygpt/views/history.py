"""Series of points, thinned to what a page can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import TypeVar

P = TypeVar("P")


def thin(points: Sequence[P], most: int, value: Callable[[P], float]) -> list[P]:
    """At most `most` points: the first, the last, and the minimum and maximum of equal intervals.

    So no peak and no dip is lost, however many points there are.
    """
    if len(points) <= most:
        return list(points)
    intervals = max(1, most // 2 - 1)
    kept = {0, len(points) - 1}
    for n in range(intervals):
        own = range(n * len(points) // intervals, (n + 1) * len(points) // intervals)
        kept.add(min(own, key=lambda place: value(points[place])))
        kept.add(max(own, key=lambda place: value(points[place])))
    return [points[place] for place in sorted(kept)]


def medians(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most `most` points: the last step and the median value of equal intervals."""
    if len(points) <= most:
        return list(points)
    bounds = [n * len(points) // most for n in range(most + 1)]
    return [
        (points[end - 1][0], median(value for _, value in points[begin:end]))
        for begin, end in pairwise(bounds)
    ]


def spread(points: Sequence[P], most: int) -> list[P]:
    """At most `most` of the points, evenly spaced from the first to the last."""
    if len(points) <= most:
        return list(points)
    return [points[n * (len(points) - 1) // (most - 1)] for n in range(most)]
