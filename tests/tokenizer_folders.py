"""Tokenizers trained on a few sentences, in folders like those of real checkpoints, and texts that are hard on them."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all.",
    "Natalia sold 48 clips in April, then half as many in May: 48 + 24 = 72 clips altogether.",
    "Below is an instruction that describes a task. Write a response that completes the request.\n\n### Response:\n",
    "def add(a, b):\n    return a + b  # it's what they'll want, isn't it?\n\n\tprint(add(1, 2))",
    "Große Straße, déjà vu, naïve café; Москва и 東京 are cities, 你好 is a greeting.",
    "system user assistant human question answer: yes, no, maybe. What is it? I don't know!",
] * 4

TEXTS = [
    "The quick brown fox.",
    "",
    " ",
    "  two  spaces   three ",
    "\n",
    "line\n\n\nline\r\n\tend\n",
    "it's we'll THEY'RE can't'd",
    "1234567890 3.14 1,000",
    "Große Straße, déjà vu",
    "cafe\u0301 \ufb01 \u00a0nbsp\u3000wide",
    "Москва 東京 你好 🦙👩‍👩‍👧 \U0001f9d9\u200d\u2642\ufe0f",
    "\u202eright to left\u0000nul\ufffd",
    "def f(x):\n        return x**2  # <tag> & more",
    "a" * 300,
    "<|not_special|> <0x41> ▁",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops the reasoning of every turn but the last, as Qwen 3's template does.
CHATML_WITH_REASONING = """{% for message in messages %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last %}
<think>{{ message.reasoning_content or '' }}</think>
{% endif %}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def llama3(folder: Path, **config: Any) -> Path:
    """Byte-level BPE with numbers in threes, a bos from the post-processor, whole words taken before merges."""
    tokenizer = tokenizers.Tokenizer.from_str(_byte_level(r"\p{N}{1,3}", nfc=False, ignore_merges=True))
    tokenizer.add_special_tokens(LLAMA3_SPECIAL)
    bos = LLAMA3_SPECIAL[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    defaults = {"bos_token": bos, "eos_token": "<|eot_id|>", "chat_template": LLAMA3}
    return _write(folder, tokenizer, defaults | config)


def qwen(folder: Path, **config: Any) -> Path:
    """Byte-level BPE with NFC and single digits, no bos, a template in ChatML."""
    tokenizer = tokenizers.Tokenizer.from_str(_byte_level(r"\p{N}", nfc=True, ignore_merges=False))
    tokenizer.add_special_tokens(QWEN_SPECIAL)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    defaults = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "chat_template": CHATML,
    }
    return _write(folder, tokenizer, defaults | config)


def llama2(folder: Path, **config: Any) -> Path:
    """A sentencepiece BPE model with byte fallback and a space before each text, and no tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sentencepiece("identity", remove_extra_whitespaces=False))
    defaults = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "chat_template": MISTRAL,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults | config))
    return folder


def normalising_sentencepiece(folder: Path) -> Path:
    """sentencepiece with its default normalisation, which squeezes spaces and changes characters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sentencepiece("nmt_nfkc", remove_extra_whitespaces=True))
    return folder


def tiktoken(folder: Path, **config: Any) -> Path:
    """The ranks of `llama3` as a tiktoken file."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads(_byte_level(r"\p{N}{1,3}", nfc=False, ignore_merges=True))["model"]["vocab"]
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    lines = [f"{base64.b64encode(bytes(byte_of[c] for c in p)).decode()} {i}" for i, p in enumerate(pieces)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    defaults = {"eos_token": "<|eot_id|>", "chat_template": LLAMA3}
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults | config))
    return folder


def _write(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def _byte_level(numbers: str, nfc: bool, ignore_merges: bool) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS + numbers + _REST), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def _sentencepiece(normalization: str, remove_extra_whitespaces: bool) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.splitlines() if line]),
        model_writer=model,
        vocab_size=460,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=remove_extra_whitespaces,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _byte_characters() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
