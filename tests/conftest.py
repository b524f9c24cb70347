"""Tiny random models of every family, written by transformers, which is the oracle of the model tests."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from kdtune import planning

# A shell lets what it starts in the background ignore ctrl-c, and so would do all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests that start a process of their own compare its numbers with these bit for bit, and sums depend on the number of
# threads. Tiny models are also faster with one.
torch.set_num_threads(1)

SIZE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_ALL_SETTINGS = YARN_ROPE | {
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "truncate": False,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
# Config class of transformers, and what differs from SIZE.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-head_dim": ("LlamaConfig", {"head_dim": 24}),
    "llama-one_kv_head_per_head": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e4}}),
    "llama-dynamic": (
        "LlamaConfig",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "llama-llama3": ("LlamaConfig", {"head_dim": 32, "rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("LlamaConfig", {"head_dim": 32, "rope_parameters": YARN_ROPE}),
    "llama-yarn_all_settings": ("LlamaConfig", {"head_dim": 32, "rope_parameters": YARN_ALL_SETTINGS}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "qwen3-tied_biases": ("Qwen3Config", {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-layer_types": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", {"head_dim": 24, "sliding_window": 6}),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Each family and rope variant in turn."""
    return request.param


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Any]:
    """`oracle("qwen3", num_hidden_layers=2)`: a transformers model with every weight random, biases and norms too."""
    import transformers

    made: dict[str, Any] = {}

    def make(name: str = "llama", **changes: Any) -> Any:
        key = f"{name} {changes}"
        if key not in made:
            config_class, differs = VARIANTS[name]
            config = getattr(transformers, config_class)(**{**SIZE, **copy.deepcopy(differs), **changes})
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            generator = torch.Generator().manual_seed(0)
            for parameter_name, parameter in model.named_parameters():
                center = 1.0 if "norm" in parameter_name else 0.0
                parameter.data.normal_(center, 0.1, generator=generator)
            made[key] = model
        # A copy, since a model with dynamic rope remembers the longest sequence that it has seen.
        return copy.deepcopy(made[key])

    return make


@pytest.fixture
def hf_folder(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`hf_folder("qwen3")`: the oracle's checkpoint in a folder of its own."""

    def make(name: str = "llama", **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        oracle(name, **changes).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def unplanned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a plan, which costs more than a tiny run; tests that want it ask for `planned`."""
    if "planned" not in request.fixturenames:
        monkeypatch.setattr(planning, "describe", lambda *_: "not planned")


@pytest.fixture
def planned() -> None:
    """See `unplanned`."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher` (random), `student` (random, smaller) and `rows.jsonl`: see `tiny_runs`."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_runs.write_model(folder / "teacher", seed=0, initializer_range=0.1)
    tiny_runs.write_model(folder / "student", seed=1, num_hidden_layers=1)
    tiny_runs.write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows the rows of `tiny`: a checkpoint folder."""
    settings = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", "epochs=8", "optimizer.lr=0.02"]
    return tiny_runs.finetune(tiny, tmp_path_factory.mktemp("trained") / "run", *settings) / "model"
