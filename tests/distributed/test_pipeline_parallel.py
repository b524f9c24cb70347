"""Ranks that each have some of the layers take the steps that one process takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from slow import marked, wanted
from steps import Training, check_same, resume, rows, save_pair, say, train
from torch import Tensor

from kdtune.distributed import ParallelConfig
from kdtune.models import from_hf_config, parameter_shapes
from kdtune.pipeline_parallel import layers_of_stages, one_forward_one_backward, weights_of_stages
from kdtune.stage import Stage

LENGTHS = (5, 1, 24, 9, 2)  # of the micro-batches of a step
LAYOUTS = {  # by number of processes
    2: {"staged": ParallelConfig(pipeline=2)},
    4: {
        "staged": ParallelConfig(pipeline=4),
        "sharded": ParallelConfig(pipeline=2, data_shard=2),
        "tensor": ParallelConfig(pipeline=2, tensor=2),
        "context": ParallelConfig(pipeline=2, context=2),
    },
}
SLOW = {"sharded_4", "context_4"}


@pytest.fixture(scope="module")
def models(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a tied head, whose ends are in two stages, and a wider teacher without."""
    folder = tmp_path_factory.mktemp("models")
    student = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    teacher = {"num_hidden_layers": 7, "hidden_size": 128, "vocab_size": 101}
    save_pair(oracle, folder, student=("qwen3-tied_biases", student), teacher=("llama", teacher))
    return folder


def sent(models: Path, parallel: ParallelConfig) -> list[float]:
    """Bytes of a step, on and back."""
    training = Training(models, parallel)
    sizes = {False: 0, True: 0}
    with pytest.MonkeyPatch.context() as patch:

        def count(stage: Stage, x: Tensor, *, back: bool = False) -> None:
            sizes[back] += x.nbytes
            send(stage, x, back=back)

        send = Stage.send
        patch.setattr(Stage, "send", count)
        training.step(1, LENGTHS)
    return training.ranks.all_sum(list(sizes.values()))


def kept(models: Path, parallel: ParallelConfig) -> int:
    """How much of what was sent in a validation the first stage still holds."""
    training = Training(models, parallel)
    for _ in range(40):
        training.teacher(rows(1)[0])
    training.ranks.wait()
    stage = training.student.stage
    assert stage is not None
    return int(training.ranks.most(len(stage._under_way)))


def work(size: int, models: Path, folder: Path, runs: Sequence[str]) -> dict[str, Any]:
    """What one process of so many does, one layout after the other."""
    found: dict[str, Any] = {}
    for name, parallel in LAYOUTS[size].items():
        if f"{name}_{size}" in runs:
            found[f"{name}_{size}"] = train(models, parallel, folder / f"{name}_{size}", LENGTHS)
    if size == 2:
        found["kept_2"] = kept(models, LAYOUTS[2]["staged"])
        found["sent_2"] = sent(models, LAYOUTS[2]["staged"])
        found["says_2"] = say(Training(models, LAYOUTS[2]["staged"]), LENGTHS)
        found["resumed: one to staged"] = resume(
            models, LAYOUTS[2]["staged"], folder / "alone_1" / "kept", folder / "resumed", LENGTHS
        )
        found["resumed: staged to sharded"] = resume(
            models, ParallelConfig(), folder / "staged_2" / "kept", folder / "resumed", LENGTHS
        )
    else:
        found["says_4"] = say(Training(models, LAYOUTS[4]["tensor"]), LENGTHS)
        found["resumed: two stages to four"] = resume(
            models, LAYOUTS[4]["staged"], folder / "staged_2" / "kept", folder / "resumed", LENGTHS
        )
    return found


@pytest.fixture(scope="module")
def found(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], Path]:
    """What the processes found; and the folder with what they wrote."""
    runs = wanted(RUNS, SLOW, request)
    folder = tmp_path_factory.mktemp("runs")
    one = ParallelConfig()
    numbers: dict[str, Any] = {
        "alone_1": train(models, one, folder / "alone_1", LENGTHS),
        "says_1": say(Training(models, one), LENGTHS),
    }
    for size in LAYOUTS:
        answers = ranks.run(size, work, folder, size, models, folder, runs)
        for answer in answers:  # what is logged is the same on every process
            torch.testing.assert_close(answer, answers[0], rtol=0, atol=0)
        numbers |= answers[0]
    for run in runs:
        kept = folder / run / "kept"
        numbers[f"resumed: {run} to one"] = resume(models, one, kept, folder / "resumed", LENGTHS)
    return numbers, folder


RUNS = [f"{name}_{size}" for size, layouts in LAYOUTS.items() for name in layouts]


@pytest.mark.parametrize("run", marked(RUNS, SLOW))
def test_steps_are_those_of_one_process(run: str, found: tuple[dict[str, Any], Path]) -> None:
    numbers, folder = found
    check_same(numbers, folder, run, "alone_1")


def test_a_run_goes_on_in_any_layout(found: tuple[dict[str, Any], Path]) -> None:
    numbers, _ = found
    resumed = {name: values for name, values in numbers.items() if name.startswith("resumed: ")}
    assert len(resumed) == 3 + len(set(RUNS) & set(numbers))
    for name, values in resumed.items():
        expected = numbers["alone_1"][1:]
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize("size", [2, 4])
def test_what_the_models_say(size: int, found: tuple[dict[str, Any], Path]) -> None:
    """With activations computed twice; logits and greedy continuations, on every stage."""
    split, alone = found[0][f"says_{size}"], found[0]["says_1"]
    for key, expected in split.items():
        torch.testing.assert_close(alone[key], expected, rtol=1e-9, atol=1e-12)


def test_what_crosses(found: tuple[dict[str, Any], Path]) -> None:
    """Hidden states of both models on, gradients of the student's back; and the tied weight's gradient, once a step."""
    positions = 2 * sum(LENGTHS)
    assert found[0]["sent_2"] == [8 * positions * (64 + 128), 8 * positions * 64]


def test_what_has_arrived_is_not_kept(found: tuple[dict[str, Any], Path]) -> None:
    assert found[0]["kept_2"] <= 4 * (2 + 1) + 1


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("behind", [0, 1, 3])
def test_a_stage_keeps_one_more_than_there_are_behind_it(behind: int, count: int) -> None:
    order = list(one_forward_one_backward(count, behind))
    for direction in ("forward", "backward"):
        assert [i for each, i in order if each == direction] == list(range(count))
    kept = list(accumulate(1 if direction == "forward" else -1 for direction, _ in order))
    assert min(kept) >= 0
    assert kept[-1] == 0
    assert max(kept) == min(count, behind + 1)


def test_the_last_stage_gets_fewer_layers_for_its_head() -> None:
    """Llama 3.2 1B: the head has as many weights as 4.3 layers."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = from_hf_config({"model_type": "llama", **shape, **heads, "tie_word_embeddings": True})
    assert [len(layers) for layers in layers_of_stages(config, 2)] == [10, 6]
    assert [len(layers) for layers in layers_of_stages(config, 4)] == [5, 5, 5, 1]
    assert [len(layers) for layers in layers_of_stages(config, 16)] == [1] * 16
    stages = weights_of_stages(config, 4)
    assert sorted(chain(*stages)) == sorted(parameter_shapes(config))
    assert stages[0][0] == "model.embed_tokens.weight"
    assert stages[-1][-1] == "model.norm.weight"
