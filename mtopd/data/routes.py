"""Which teacher scores a prompt."""

from __future__ import annotations

from collections.abc import Mapping

from mtopd.types import MtopdError

Routes = Mapping[str, Mapping[str, str]]  # by teacher, in the order of their indices


def route(fields: Mapping[str, str], routes: Routes) -> int:
    """The index of the teacher whose route matches: all its keys equal the prompt's fields.

    Of several the one with the most keys is taken; the empty route matches everything.
    """
    matching = {name: len(keys) for name, keys in routes.items() if keys.items() <= fields.items()}
    known = "; ".join(f"{name}: {dict(keys)}" for name, keys in routes.items())
    if not matching:
        raise MtopdError(
            f"no teacher's route matches a prompt with {dict(fields)}; the routes are {known}: add "
            "a teacher for it, or take the prompt out"
        )
    best = [name for name, num_keys in matching.items() if num_keys == max(matching.values())]
    if len(best) > 1:
        raise MtopdError(
            f"teachers {', '.join(best)} match a prompt with {dict(fields)} equally well; the routes "
            f"are {known}: make one of them more specific"
        )
    return [*routes].index(best[0])
