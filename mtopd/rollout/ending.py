"""When a response is over: at an end token, or as soon as its text holds a stop string.

The student has sampled what ends a response: an end token and the tokens of a stop string belong to
``response_ids`` and are trained like every other; nothing is put behind them.  The response's text
has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

    def is_over(self, response_ids: Sequence[int]) -> bool:
        """Of a response that was not over one token before.  Special tokens count as text here, so
        that a stop string can name one.
        """
        if response_ids[-1] in self._end_ids:
            return True
        if not self._stop:
            return False
        text = self._tokenizer.decode(
            list(response_ids[-self._window :]), clean_up_tokenization_spaces=False
        )
        return any(stop in text for stop in self._stop)

    def text(self, response_ids: Sequence[int]) -> str:
        """What the response says, up to the first stop string; without special and end tokens."""
        if response_ids and response_ids[-1] in self._end_ids:
            response_ids = response_ids[:-1]
        text = decode_response(self._tokenizer, response_ids)
        return text[: min((text.find(stop) for stop in self._stop if stop in text), default=None)]
