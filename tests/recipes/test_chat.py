"""Training on chats with a template that the base model does not have, and asking the finished model with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import distil, finetune

from kdtune import tokenizers
from kdtune.cli.main import main
from kdtune.tokenizers import chat

# The quickstart's tokenizer has bos and eos and no other special token, so that a file ends turns with its eos.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content + eos_token }}{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

SHORT = ["max_steps=2", "lr_scheduler.num_warmup_steps=1"]


@pytest.mark.parametrize("recipe", [distil, finetune], ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize("name", ["llama2", "a file"])
def test_the_finished_model_is_asked_as_it_was_trained(
    recipe: Callable[..., Path], name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    turns = [[("user", row["prompt"].strip()), ("assistant", row["completion"])] for row in rows]
    chats = [{"conversations": [{"from": role, "value": text} for role, text in turn]} for turn in turns]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    template = chat.read("llama2") if name == "llama2" else TEMPLATE
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    given = name if name == "llama2" else str(tmp_path / "mine.jinja")
    data = [f"{section}.source={tmp_path / 'chats.jsonl'}" for section in ("dataset", "dataset_val")]
    data += [f"{section}.format=chat" for section in ("dataset", "dataset_val")]
    settings = [*data, f"dataset.chat_template={given}", "dataset_val.chat_template=${dataset.chat_template}"]

    run = recipe(tiny, tmp_path / "run", *settings, "tokenizer.max_seq_len=96", *SHORT)
    model = tokenizers.load(run / "model")
    assert model.chat_templates == {"default": template}
    assert model.eos_id in model.eos_ids
    command, _ = (shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  kdtune "))
    assert command[:3] == ["kdtune", "run", "generate"]
    assert command[-2:] == ["chat=true", "prompt=Hello"]
    main([*command[1:], "max_new_tokens=4"])
    assert "--- Hello" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        recipe(tiny, tmp_path / "other", *data, f"dataset.chat_template={given}")
    assert "dataset_val.chat_template=null: but a model has one template" in capsys.readouterr().err
    assert tiny_runs.lines(run)
