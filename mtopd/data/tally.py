"""What is asked of all prompts of a run together: whether every teacher has some, and how many
held-out ones are trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from mtopd.data.routes import Routes
from mtopd.types import MtopdError, Prompt

_DIGEST = 16  # bytes
_SHOWN = 8  # values of a field that an error tells


class PromptTally:
    """Counts prompts as they come, and keeps 16 bytes of each."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._asked: set[int] = set()  # teachers with a training prompt
        # values of the fields that routes name
        self._found: dict[str, set[str]] = {key: set() for keys in routes.values() for key in keys}
        self._train = bytearray()  # digests of prompts, one behind the other
        self._held_out: set[bytes] = set()

    def add(self, prompts: Sequence[Prompt], is_held_out: bool) -> None:
        for prompt in prompts:
            ids = np.asarray(prompt.prompt_ids, dtype=np.int32)
            digest = hashlib.blake2b(ids.tobytes(), digest_size=_DIGEST).digest()
            if is_held_out:
                self._held_out.add(digest)
            else:
                self._train += digest
                self._asked.add(prompt.teacher_index)
            for key, values in self._found.items():
                if key in prompt.route:
                    values.add(prompt.route[key])
                    if len(values) > _SHOWN:
                        values.remove(max(values))

    def check_every_teacher_is_asked(self) -> None:
        """A value that looks the same but is another text (a blank, another spelling of an accent)
        would leave a teacher without prompts, and the one with the empty route with those of two.
        An empty route may catch nothing.
        """
        for index, (name, keys) in enumerate(self._routes.items()):
            if not keys or index in self._asked:
                continue
            found = {key: sorted(self._found[key]) for key in keys}
            raise MtopdError(
                f"no training prompt goes to teacher {name!a}: its route is {dict(keys)!a}, "
                f"prompts have {found!a} there (eight values at most); correct the route or the "
                "prompts' fields, or remove the teacher"
            )

    def say_seen(self, say: Callable[[str], None]) -> None:
        """How many held-out prompts are trained on: the accuracy on them is not that on new ones."""
        train = memoryview(self._train)
        digests = (bytes(train[i : i + _DIGEST]) for i in range(0, len(train), _DIGEST))
        if seen := self._held_out.intersection(digests):
            say(
                f"{len(seen)} of {len(self._held_out)} different held-out prompts are training "
                "prompts, too: the accuracy on them says little of new ones"
            )
