"""Which teacher scores a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtopd.types import MtopdError


def route(fields: Mapping[str, str], routes: Sequence[Mapping[str, str]]) -> int:
    """The index of the teacher whose route matches: all its keys equal the prompt's fields.

    Of several the one with the most keys is taken; the empty route matches everything.
    """
    matching = [index for index, keys in enumerate(routes) if keys.items() <= fields.items()]
    known = "; ".join(f"{index}: {dict(keys)}" for index, keys in enumerate(routes))
    if not matching:
        raise MtopdError(
            f"no teacher's route matches a prompt with {dict(fields)}; the routes are {known}: add "
            "a teacher for it, "
            "or take the prompt out"
        )
    most_keys = max(len(routes[index]) for index in matching)
    best = [index for index in matching if len(routes[index]) == most_keys]
    if len(best) > 1:
        raise MtopdError(
            f"teachers {best} match a prompt with {dict(fields)} equally well; the routes are "
            f"{known}: make one of "
            "them more specific"
        )
    return best[0]
