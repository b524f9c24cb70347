"""Text to token ids and back, and chats to text, for whatever tokenizer a Hugging Face folder holds.

`load(folder)` gives one `Tokenizer`, over `tokenizer.json`, a sentencepiece model or a tiktoken rank file.
`difference(a, b)` says whether two of them give the same meaning to the ids that they share.
"""

from kdtune.tokenizers.chat import ChatTemplate, Rendered
from kdtune.tokenizers.tokenizer import Tokenizer, TokenizerConfig, difference, load

__all__ = ["ChatTemplate", "Rendered", "Tokenizer", "TokenizerConfig", "difference", "load"]
