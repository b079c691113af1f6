"""When a response is over: at an end token, or as soon as its text holds a stop string.

The student has sampled what ends a response: an end token and the tokens of a stop string belong to
``response_ids`` and are trained like every other; nothing is put behind them.  The response's text
has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mtopd.tokenizer import decode_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens looked at beyond the stop string's own: a decoder may strip a space where it begins, and a
# character can be made of several tokens.
_MARGIN = 8


class Ending:
    """The end tokens and stop strings of a run's student."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._stop = tuple(stop)
        # A token makes at least one byte of text, so this many hold a stop string that ends in the
        # last of them; decoding all tokens anew for each would cost the square of their number.
        self._window = max((len(text.encode()) for text in stop), default=0) + _MARGIN

    @property
    def end_ids(self) -> frozenset[int]:
        return self._end_ids

    @property
    def window(self) -> int:
        """How many of a response's last tokens ``are_over`` looks at."""
        return self._window

    @property
    def stop(self) -> tuple[str, ...]:
        return self._stop

    def are_over(
        self, response_ids_BS: npt.NDArray[np.int32], min_response: int = 0
    ) -> npt.NDArray[np.bool_]:
        """[B] which responses of one length are over, that were not one token before."""
        ends = np.isin(response_ids_BS[:, -1], [*self._end_ids])
        if self._stop:
            for row in np.flatnonzero(~ends):
                ends[row] = self._has_stop(response_ids_BS[row], min_response)
        return ends

    def is_over(self, response_ids: Sequence[int], min_response: int = 0) -> bool:
        """``are_over`` of one response.  Special tokens count as text here, so that a stop string can
        name one.
        """
        return bool(self.are_over(np.asarray([response_ids], np.int32), min_response)[0])

    def _has_stop(self, response_ids: npt.NDArray[np.int32], min_response: int) -> bool:
        recent = response_ids[-self._window :].tolist()
        text = self._decode(recent)
        found = [stop for stop in self._stop if stop in text]
        if not found or not min_response:
            return bool(found)
        # One that was complete before ``min_response`` ended nothing, and stands there still.
        before = len(self._decode(recent[:-1]).rstrip("\ufffd"))
        return any(text.rfind(stop) + len(stop) > before for stop in found)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def turn_text(self, response_ids: Sequence[int]) -> str:
        """All that a turn says, for who replies to it: special tokens and a stop string stand in it,
        the end token does not.
        """
        if response_ids and response_ids[-1] in self._end_ids:
            response_ids = response_ids[:-1]
        return self._decode(response_ids)

    def text(self, response_ids: Sequence[int]) -> str:
        """What the response says, up to the first stop string; without special and end tokens."""
        if response_ids and response_ids[-1] in self._end_ids:
            response_ids = response_ids[:-1]
        text = decode_response(self._tokenizer, response_ids)
        return text[: min((text.find(stop) for stop in self._stop if stop in text), default=None)]
