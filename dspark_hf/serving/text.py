"""Tokens to text, as they come."""

from transformers import PreTrainedTokenizerBase

# What a decoder writes for bytes that are no character yet.
UNFINISHED = "\ufffd"


class TextStream:
    """The text of a request, in pieces that are final.

    Args:
        stops: strings that end the text and are no part of it.

    Attributes:
        is_stopped: whether one of them has come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.is_stopped = False
        self.given = 0

    def piece(self, tokens: list[int], is_last: bool) -> str:
        """What has been added to the text of all tokens so far, but what may be part of a character or stop string that
        is not complete yet."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [text.index(stop) for stop in self.stops if stop in text]
        if ends:
            self.is_stopped, text = True, text[: min(ends)]
        elif not is_last:
            text = text.rstrip(UNFINISHED)
            text = text[: len(text) - self._held_back(text)]
        piece, self.given = text[self.given :], max(self.given, len(text))
        return piece

    def _held_back(self, text: str) -> int:
        """Characters at the end with which a stop string begins."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)
