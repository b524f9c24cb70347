"""Heads of which each rank has a slice, on 2 and on 4 ranks, against one rank and against dense float64 autograd.

The ranks are started once, compute all cases, and write down what came out.
"""

import copy
import functools
from datetime import timedelta
from typing import get_args

import pytest
import ranks as processes
import torch
import torch.distributed as dist
from problems import DEFINITIONS, make_problem, values_of
from test_engine import AdaptedHead, Head, like
from torch import nn

from kdtune.losses import (
    IGNORE,
    DivergenceName,
    SampledTargets,
    Targets,
    TopKTargets,
    Vocabulary,
    by_autograd,
    chunked,
    distillation_loss,
    divergence,
)
from kdtune.losses.vocabulary import is_sum_over_entries

NAMES = [name for name in get_args(DivergenceName) if name != "adaptive_kl"]
SIZES = {"same": (37, 37), "padded": (41, 37), "larger_teacher": (37, 44), "by_128": (165, 37), "tiny": (5, 5)}
SHAPE = {"d": 7, "d_t": 6, "b": 2, "s": 17, "bias": True}


def squared_hellinger(log_p, log_q):
    gap, root = (log_q / 2).exp() - (log_p / 2).exp(), (log_q / 2).exp()
    return gap.square().sum(-1) / 2, gap * root / 2


def bhattacharyya(log_p, log_q):
    """The same, written as what no part of a row can tell."""
    common = ((log_p + log_q) / 2).exp()
    return 1 - common.sum(-1), -common / 2


def case(sizes="same", dtype=torch.float64, change=None, top_k=None, **settings):
    """A problem, and how its loss is computed.

    `top_k`: what `TopKTargets` gets beside the teacher's tokens, or what makes targets of log p and the labels.
    """
    v, v_t = SIZES[sizes]
    problem = make_problem(dtype=dtype, v=v, v_t=v_t, **SHAPE)
    problem = problem if change is None else change(*problem)
    settings = {"ce_weight": 0.4, "kd_weight": 0.6, "temperature": 1.0, "chunk_size": 12} | settings
    # Whose slopes do not add up to 0, as those of the forward KL do.
    default = {"divergence": divergence("jsd", beta=0.3)} if top_k is None else {}
    return problem, top_k, default | settings


def with_head(make):
    def change(hidden, head, *others):
        return hidden, make(head), *others

    return change


def capped(head):
    return like(Head(7, head.out_features, dtype=head.weight.dtype, soft_cap=2.0, logit_scale=0.7), head)


def adapted(head):
    torch.manual_seed(3)
    head.bias = None
    return AdaptedHead(head)


def both_capped(hidden, head, teacher_hidden, teacher_head, labels):
    return (
        hidden,
        capped(head),
        teacher_hidden,
        like(Head(6, 37, dtype=torch.float64, soft_cap=3.0), teacher_head),
        labels,
    )


def all_equal(hidden, head, teacher_hidden, teacher_head, labels):
    for parameter in (*head.parameters(), *teacher_head.parameters()):
        nn.init.zeros_(parameter)
    return hidden, head, teacher_hidden, teacher_head, labels


def ruled_out(hidden, head, teacher_hidden, teacher_head, labels):
    with torch.no_grad():
        teacher_head.bias[:20] = -torch.inf
    return hidden, head, teacher_hidden, teacher_head, labels


def identical(hidden, head, teacher_hidden, teacher_head, labels):
    return hidden, head, hidden.detach(), copy.deepcopy(head), labels


def unlabelled(hidden, head, teacher_hidden, teacher_head, labels):
    return hidden, head, teacher_hidden, teacher_head, torch.full_like(labels, IGNORE)


def sampled(log_p, labels):
    """Few draws of labelled positions alone, some of tokens that the student does not have."""
    log_p = log_p[labels != IGNORE]
    ids = torch.multinomial(log_p.exp(), 6, True, generator=torch.Generator().manual_seed(1))
    ids[:, 5] = torch.arange(len(ids)) % 3 - 1  # -1 is none
    metrics = metrics_of(log_p, labels[labels != IGNORE])
    return SampledTargets(ids.int(), log_p.exp().gather(-1, ids.clamp(min=0)), **metrics, vocab_size=log_p.shape[-1])


def few(log_p, labels, convention):
    """Up to 5 tokens of labelled positions alone, of some none."""
    log_p = log_p[labels != IGNORE]
    log_probs, ids = log_p.topk(5)
    ids = ids.masked_fill(torch.arange(5) >= torch.arange(len(ids))[:, None] % 6, -1)
    metrics = metrics_of(log_p, labels[labels != IGNORE])
    return TopKTargets(ids.int(), log_probs, None, convention, log_p.shape[-1], **metrics)


def metrics_of(log_p, labels):
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    label_log_probs = log_p.gather(-1, labels[:, None])[:, 0]
    return {"entropy": entropy, "label_log_probs": label_log_probs, "top_ids": log_p.argmax(-1)}


CASES = {
    **{f"{name}": case(divergence=divergence(name)) for name in NAMES},
    **{f"{name}, T": case("padded", divergence=divergence(name), temperature=1.7) for name in NAMES},
    **{f"sizes {sizes}": case(sizes, with_metrics=True) for sizes in SIZES},
    **{f"sizes {sizes}, T": case(sizes, temperature=2.0, label_margin=0.1) for sizes in SIZES},
    "labels": case(label_smoothing=0.1, z_loss=0.01),
    "labels alone": case("tiny", label_smoothing=0.1, z_loss=0.01, kd_weight=0.0),
    "margin": case("by_128", label_margin=0.3),
    "share": case("padded", teacher_share=0.3, temperature=1.3, with_metrics=True),
    "balance": case(balance=True),
    "unscaled": case(temperature=2.0, scale_by_temperature_squared=False),
    "own": case("padded", divergence=squared_hellinger),
    "soft cap": case(change=both_capped, temperature=1.3, with_metrics=True),
    "soft cap, top k": case(change=with_head(capped), top_k={}),
    "adapter": case("padded", change=with_head(adapted)),
    "ruled out": case(change=ruled_out),
    "infinite": case(change=ruled_out, divergence=divergence("reverse_kl")),
    "all logits equal": case(change=all_equal, with_metrics=True),
    "identical": case(change=identical, dtype=torch.float32, ce_weight=0.0, kd_weight=1.0),
    "nothing labelled": case(change=unlabelled, with_metrics=True),
    "float32": case("padded", dtype=torch.float32),
    "bf16": case("padded", dtype=torch.bfloat16),
    **{
        f"top k, {convention}, {name}": case(divergence=divergence(name), top_k={"convention": convention})
        for convention in ("bucket", "renormalised")
        for name in get_args(DivergenceName)
    },
    **{
        f"top k, {convention}, padded": case("padded", top_k={"convention": convention, "vocab_size": 37})
        for convention in ("bucket", "renormalised", "partial", "student_full")
    },
    "top k, T": case(top_k={"convention": "renormalised"}, temperature=2.0),
    "top k, all": case("tiny", top_k={"convention": "bucket"}),
    **{
        f"few, {convention}, {sizes}": case(
            sizes, top_k=functools.partial(few, convention=convention), with_metrics=True
        )
        for convention in ("bucket", "renormalised", "partial", "student_full")
        for sizes in ("same", "padded", "larger_teacher", "tiny")
    },
    **{f"samples, {sizes}": case(sizes, top_k=sampled, with_metrics=True) for sizes in SIZES},
    "samples, capped": case("padded", change=with_head(capped), top_k=sampled, label_smoothing=0.1, z_loss=0.01),
    "few, capped": case(
        "padded", change=with_head(capped), top_k=functools.partial(few, convention="bucket"), label_smoothing=0.1
    ),
    "two temperatures": case("padded", temperature=1.7, teacher_temperature=0.6),
    "top k, two temperatures": case(top_k={"convention": "renormalised"}, temperature=1.7, teacher_temperature=0.6),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}


def cut(head, held):
    """A head with the entries `held` of another."""
    part = copy.deepcopy(head)
    for name, parameter in head.named_parameters():
        if name != "a":  # which is of the width
            setattr(part, name, nn.Parameter(parameter.detach()[held].clone(), parameter.requires_grad))
    return part


def compute(problem, top_k, settings, vocabulary=None, teacher_vocabulary=None):
    """All values of the loss, and the gradients of the hidden states and of what the head has."""
    hidden, head, teacher_hidden, teacher_head, labels = problem
    log_p = teacher_head(teacher_hidden).detach().log_softmax(-1)
    head, teacher_head = (
        cut(x, slice(None) if part is None else part.held(x.weight.shape[0]))
        for x, part in ((head, vocabulary), (teacher_head, teacher_vocabulary or vocabulary))
    )
    if top_k is None:
        targets = Targets(teacher_hidden, teacher_head)
    elif callable(top_k):
        targets = top_k(log_p, labels)
    else:
        log_probs, ids = log_p.topk(5)
        targets = TopKTargets(ids, log_probs, **top_k)
    hidden = hidden.detach().requires_grad_()
    loss = distillation_loss(hidden, head, labels, 19, targets, **settings, vocabulary=vocabulary)
    (3 * loss.total).backward()
    grads = {name: parameter.grad for name, parameter in head.named_parameters() if parameter.requires_grad}
    return torch.stack([*values_of(loss).values()]).detach(), hidden.grad, grads


COLLECTIVES = [name for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter"))]


def counted(*args):
    """Names of the collectives of a loss and its gradients, and the bytes that each rank puts in."""
    seen = []

    def counting(name, function):
        def call(*args, **kwargs):
            seen.append((name, args[0 if name == "all_reduce" else 1].nbytes))
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        compute(*args)
    return seen


def refusal(*args):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        compute(*args)
    return str(error.value)


def work():
    """What one process does."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    results = {}
    for name, (problem, top_k, settings) in CASES.items():
        sizes = (x.weight.shape[0] for x in (problem[1], problem[3]))
        results[name] = compute(problem, top_k, settings, Vocabulary(group, *sizes))
    same, padded, apart = Vocabulary(group, 37), Vocabulary(group, 41, 37), Vocabulary(group, 37)
    results["collectives"] = {
        (kind, chunk_size): counted(*case(chunk_size=chunk_size, **changes), same)
        for kind, changes in {"dense": {}, "top k": {"top_k": {}}}.items()
        for chunk_size in (2, 9, 100)
    }
    with pytest.MonkeyPatch.context() as patch:
        asked = results["asked"] = []
        patch.setattr(chunked, "default_chunk_size", lambda *sizes: asked.append(sizes[:2]) or 12)
        for name, sizes in SIZES.items():
            compute(*case(name, chunk_size=None), Vocabulary(group, *sizes))
    results["refusals"] = {
        "adaptive_kl": refusal(*case(divergence=divergence("adaptive_kl")), same),
        "own": refusal(*case(divergence=bhattacharyya), same),
        "cut apart": refusal(*case("padded"), padded, apart),
    }
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each of so many ranks has found."""
    return processes.run(request.param, work, tmp_path_factory.mktemp("ranks"))


@functools.cache
def of_one_rank(name):
    return compute(*CASES[name])


def joined(grads):
    """Of a head, from those of its slices."""
    return {name: x if name == "a" else torch.cat([part[name] for part in grads]) for name, x in grads[0].items()}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank(ranks, name):
    values, hidden_grad, grads = of_one_rank(name)
    found = [rank[name] for rank in ranks]
    tolerance = TOLERANCE[hidden_grad.dtype]

    def close(x, expected):
        """To the largest that there is: of what cancels, rounding is all that is left."""
        largest = expected[expected.isfinite()].abs().max().item()
        torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)

    for values_there, hidden_grad_there, grads_there in found:  # all of it on each rank: nothing is left to add up
        close(values_there, values)
        close(hidden_grad_there, hidden_grad)
        assert torch.equal(hidden_grad_there.nan_to_num(), found[0][1].nan_to_num())
        assert torch.equal(values_there, found[0][0])
        if "a" in grads:
            close(grads_there["a"], grads["a"])
    for parameter, grad in joined([x for _, _, x in found]).items():
        close(grad, grads[parameter])


@pytest.mark.parametrize("name", NAMES)
def test_equals_dense_autograd(ranks, name):
    """Gradients too: two other tools' are a multiple of it, by the number of ranks."""
    (hidden, head, teacher_hidden, teacher_head, labels), _, settings = CASES[f"{name}, T"]
    hidden, head = hidden.detach().requires_grad_(), copy.deepcopy(head)
    scored, temperature = labels != IGNORE, settings["temperature"]
    z_s, z_t = head(hidden)[scored], teacher_head(teacher_hidden)[scored].detach()
    ce = nn.functional.cross_entropy(z_s, labels[scored], reduction="sum")
    p, q = (x[:, :37].div(temperature).softmax(-1) for x in (z_t, z_s))
    total = (0.4 * ce + 0.6 * temperature**2 * DEFINITIONS[name](p, q).sum()) / 19
    (3 * total).backward()
    for values, hidden_grad, _ in (rank[f"{name}, T"] for rank in ranks):
        torch.testing.assert_close(values[0], total.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(hidden_grad, hidden.grad, rtol=1e-9, atol=1e-12)
    grads = joined([rank[f"{name}, T"][2] for rank in ranks])
    torch.testing.assert_close(grads, {n: p.grad for n, p in head.named_parameters()}, rtol=1e-9, atol=1e-12)


def test_a_student_equal_to_its_teacher_has_no_gradient_to_the_last_bit(ranks):
    for _, hidden_grad, grads in (rank["identical"] for rank in ranks):
        assert all((x == 0).all() for x in (hidden_grad, *grads.values()))


@pytest.mark.parametrize("chunk_size", [2, 9, 100])
@pytest.mark.parametrize(("kind", "columns"), [("dense", 4), ("top k", 2 + 5 + 2)])
def test_what_crosses_ranks(ranks, kind, columns, chunk_size):
    """A few collectives a chunk, however large the vocabulary: what docs/distributed.md says."""
    num_labels = int((CASES["labels"][0][-1] != IGNORE).sum())
    chunks = -(-num_labels // chunk_size)
    for rank in ranks:
        sent = rank["collectives"][kind, chunk_size]
        names = [name for name, _ in sent]
        assert names.count("all_gather") == chunks
        assert names.count("all_reduce") == (2 if kind == "dense" else 1) * chunks + 1
        assert len(names) == names.count("all_gather") + names.count("all_reduce")
        per_token = columns + (1 if kind == "dense" else 0) + SHAPE["d"]
        assert sum(size for _, size in sent) == 8 * (per_token * num_labels + 7)


def test_chunks_are_the_same_however_little_a_rank_holds(ranks):
    """Ranks would wait for each other forever otherwise."""
    assert len(ranks[0]["asked"]) == len(SIZES)
    assert all(rank["asked"] == ranks[0]["asked"] for rank in ranks)


def test_refusals(ranks):
    for rank in ranks:
        assert "adaptive_kl is not a sum over the entries" in rank["refusals"]["adaptive_kl"]
        assert "bhattacharyya is not a sum over the entries" in rank["refusals"]["own"]
        assert "Cut both heads as Vocabulary.held says" in rank["refusals"]["cut apart"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [squared_hellinger, bhattacharyya])
def test_a_divergence_of_ones_own_is_tried_out(own, dtype):
    by_itself = by_autograd(lambda log_p, log_q: own(log_p, log_q)[0])
    assert is_sum_over_entries(by_itself, dtype, torch.device("cpu")) == (own is squared_hellinger)


@pytest.mark.slow
def test_compiled_equals_eager():
    """Of a group of one rank, which has all there is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        problem = make_problem(dtype=torch.float32, v=70_001)
        changes = {"temperature": 2.0, "label_smoothing": 0.1, "z_loss": 1e-3, "with_metrics": True}
        settings = {"ce_weight": 0.4, "kd_weight": 0.6} | changes
        vocabulary = Vocabulary(dist.group.WORLD, 70_001)
        eager = compute(problem, None, settings)
        compiled = compute(problem, None, settings | {"compile": True}, vocabulary)
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()
