"""Long texts for models that read only the first tokens."""

from __future__ import annotations

from tokenizers import Encoding, Tokenizer

#: Characters that are tokenised first, for each token that a model reads. English has 4 to 5.
_CHARACTERS = 16


def head(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """Return the beginning of a text, if it has the same first tokens as the whole text.

    A tokenizer takes 2 to 9 seconds for a text of a megabyte, also if all but its first tokens are
    dropped. Words are tokenised one by one, so what follows the second next word does not matter.

    Args:
      text: any text.
      tokenizer: the model's tokenizer, which cuts off on the right if at all.
      max_tokens: number of tokens that the model reads.
    Returns:
      The beginning, or the whole text if it is short or its words are too long to tell.
    """
    size = _CHARACTERS * max_tokens
    if len(text) <= 2 * size or (tokenizer.truncation or {}).get("direction") == "left":
        return text
    begun = tokenizer.encode(text[:size], add_special_tokens=False)
    words = [word for part in (begun, *begun.overflowing) for word in _words(part)]
    enough = len(words) > max_tokens and words[max_tokens - 1] + 2 <= words[-1]
    return text[:size] if enough else text


def _words(encoding: Encoding) -> list[int]:
    return [word for word in encoding.word_ids if word is not None]
