"""Every request as lm-evaluation-harness's own `hf` model answers it, with transformers' model of the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tokenizer_folders

from kdtune import tokenizers
from kdtune.checkpoint import load_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kdtune[eval]'")

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kdtune.evaluation.harness import Generation, HarnessModel

FOLDERS = {"llama3": tokenizer_folders.llama3, "qwen": tokenizer_folders.qwen, "llama2": tokenizer_folders.llama2}
LENGTH = 64
LONG = " ".join(tokenizer_folders.CORPUS[:4])
BOS = {"llama3": "<|begin_of_text|>", "qwen": "<|endoftext|>", "llama2": "<s>"}
QUESTION = "Question: Natalia sold 48 clips in April. How many?\nAnswer:"


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HarnessModel, HFLM, str]:
    """Ours and the harness's own, of a model whose weights are large enough for it to have opinions."""
    name = request.param
    folder = FOLDERS[name](tmp_path_factory.mktemp(name))
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    config.max_position_embeddings = LENGTH
    tokenizer = tokenizers.load(folder)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    # Neither what is no text, nor bytes of sentencepiece: of some that are no characters, libraries show other signs.
    bytes_of_llama2 = range(3, 259) if name == "llama2" else ()
    model.lm_head.weight.data[[*tokenizer.special_ids, *bytes_of_llama2, *range(tokenizer.vocab_size, 600)]] = 0.0
    model.save_pretrained(folder)
    theirs = HFLM(model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=3, max_length=LENGTH)
    ours = load_model(folder, dtype=torch.float32, device="cpu")
    return HarnessModel(ours, tokenizer, max_seq_len=LENGTH, max_tokens=200, progress=False), theirs, name


def ask(lm: Any, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    instances = [Instance(kind, {}, one, 0, ("a_task", i, 1)) for i, one in enumerate(arguments)]
    return getattr(lm, kind)(instances, disable_tqdm=True)


def test_log_likelihoods(pair: tuple[HarnessModel, HFLM, str]) -> None:
    ours, theirs, name = pair
    contexts = [QUESTION, QUESTION + " ", "The fox jumps over  \n", f"{BOS[name]}The quick", LONG + QUESTION, "Große"]
    continuations = [" 24", " 48 clips altogether.", "x", "\n\n東京", " it's"]
    arguments = [(context, continuation) for context in contexts for continuation in continuations]
    arguments += [("", "The dog"), ("", f"{BOS[name]}The dog"), (QUESTION, LONG[:60])]
    assert_same(ours, theirs, arguments)
    assert ours.num_cut["a_task"]
    # What the model would say is greedy, unless its token becomes another behind the context.
    said = ask(ours, "generate_until", [(context, {"max_gen_toks": 1}) for context in contexts])
    again = [(context, text) for context, text in zip(contexts, said, strict=True) if text]
    assert True in assert_same(ours, theirs, again)


def assert_same(ours: HarnessModel, theirs: HFLM, arguments: list[tuple[str, str]]) -> list[bool]:
    found, are_greedy = zip(*ask(ours, "loglikelihood", arguments), strict=True)
    expected, expected_greedy = zip(*ask(theirs, "loglikelihood", arguments), strict=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert are_greedy == expected_greedy
    return are_greedy


def test_whole_texts(pair: tuple[HarnessModel, HFLM, str]) -> None:
    ours, theirs, name = pair
    texts = [("The quick brown fox.",), (LONG,), (LONG * 3,), (f"{BOS[name]}It's",), ("Москва 東京",), ("x ",)]
    np.testing.assert_allclose(
        ask(ours, "loglikelihood_rolling", texts), ask(theirs, "loglikelihood_rolling", texts), rtol=1e-5
    )
    assert ask(ours, "loglikelihood_rolling", [("",)]) == ([0.0] if name == "qwen" else [pytest.approx(-9, abs=9)])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_gen_toks": 12},
        {"until": ["e"], "max_gen_toks": 12},
        {"until": ["o", "is", " a"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 20},
        {"until": "\n", "max_new_tokens": 5},
    ],
    ids=str,
)
def test_texts(pair: tuple[HarnessModel, HFLM, str], kwargs: dict[str, Any]) -> None:
    ours, theirs, name = pair
    contexts = [
        QUESTION,
        QUESTION + " ",
        LONG,
        "The",
        f"{BOS[name]}The quick",
        "def add(a, b):\n    return",
        "Große 東",
    ]
    arguments = [(context, kwargs) for context in contexts]
    found = ask(ours, "generate_until", arguments)
    # One at a time: of a batch it looks only at the first text for a bos.
    assert found == [ask(theirs, "generate_until", [one])[0] for one in arguments]
    assert all(stop not in text for text in found for stop in kwargs.get("until", []))
    assert len(set(found)) > 2


def test_a_row_stops_at_its_text(pair: tuple[HarnessModel, HFLM, str]) -> None:
    ours, _, _ = pair
    ours.num_tokens.clear()
    (free,) = ask(ours, "generate_until", [(QUESTION, {"max_gen_toks": 30, "until": []})])
    assert ours.num_tokens["a_task", 0] == 30
    ours.num_tokens.clear()
    stop = free[5:7]
    assert ask(ours, "generate_until", [(QUESTION, {"max_gen_toks": 30, "until": [stop]})]) == [free.split(stop)[0]]
    assert ours.num_tokens["a_task", 0] < 15


def test_drawn_texts_repeat_and_differ(pair: tuple[HarnessModel, HFLM, str]) -> None:
    ours, _, _ = pair
    arguments = [(QUESTION, {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0})] * 40
    found = ask(ours, "generate_until", arguments)
    assert len(set(found)) > 30
    assert found == ask(ours, "generate_until", arguments)


def test_chats(pair: tuple[HarnessModel, HFLM, str]) -> None:
    ours, theirs, name = pair
    chat = [{"role": "user", "content": "What is 24 + 48? "}, {"role": "assistant", "content": "It is "}]
    assert ours.apply_chat_template(chat[:1]) == theirs.apply_chat_template(chat[:1])
    assert ours.apply_chat_template(chat, False) == theirs.apply_chat_template(chat, False)
    with_system = [{"role": "system", "content": "Be brief."}, *chat[:1]]
    assert ours.apply_chat_template(with_system) == theirs.apply_chat_template(with_system)
    assert ("Be brief." in ours.apply_chat_template(with_system)) == (name != "llama2"), "which refuses the role"
    text = ours.apply_chat_template(chat[:1])
    assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_continuations_without_tokens(pair: tuple[HarnessModel, HFLM, str]) -> None:
    ours, _, _ = pair
    with pytest.raises(ValueError, match="a_task, document 0: 'The' has no more tokens than its context alone"):
        ask(ours, "loglikelihood", [("The", "")])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "its generation_kwargs have num_beams, which kdtune does not do"),
        ({"do_sample": True}, "do_sample and no temperature above 0"),
    ],
)
def test_refused_settings(kwargs: dict[str, Any], message: str, pair: tuple[HarnessModel, HFLM, str]) -> None:
    with pytest.raises(ValueError, match=message):
        Generation.of(kwargs, pair[0]._tokenizer)
