"""A teacher known by its top k: each convention against its definition in float64."""

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from problems import DEFINITIONS, assert_padding_gets_nothing, kd_and_grad, kl, loss_of_logits, make_logits
from torch import nn

from kdtune.losses import DivergenceName, SampledTargets, TopKTargets, by_autograd, distillation_loss, divergence
from kdtune.losses.targets import Convention

NAMES = get_args(DivergenceName)
CONVENTIONS = get_args(Convention)
every_divergence = pytest.mark.parametrize("name", NAMES)
every_convention = pytest.mark.parametrize("convention", CONVENTIONS)


def top_k(teacher, k, convention="bucket", log_rest=None):
    """Of logits [n, v], as a cache would hold it."""
    log_probs, ids = teacher.log_softmax(-1).topk(k)
    return TopKTargets(ids, log_probs, log_rest, convention)


def defined(student, targets, name="forward_kl", temperature=1.0, teacher_temperature=None):
    """The sum over the rows and its gradient by autograd, from all of the student's probabilities."""
    student = student.detach().double().requires_grad_()
    p, q = targets.log_probs.double().exp(), student.softmax(-1).gather(-1, targets.ids)
    if targets.convention == "bucket":
        in_bucket = torch.ones_like(student).scatter(-1, targets.ids, 0)
        q_rest = (student.softmax(-1) * in_bucket).sum(-1, keepdim=True)
        p_rest = 1 - p.sum(-1, keepdim=True) if targets.log_rest is None else targets.log_rest.double().exp()[:, None]
        kd = DEFINITIONS[name](torch.cat([p, p_rest], -1), torch.cat([q, q_rest], -1)).sum()
    elif targets.convention == "renormalised":
        p = p ** (1 / (teacher_temperature or temperature))
        q = (student.gather(-1, targets.ids) / temperature).softmax(-1)
        kd = DEFINITIONS[name](p / p.sum(-1, keepdim=True), q).sum() * temperature**2
    elif targets.convention == "student_full":
        kd = kl(p / p.sum(-1, keepdim=True), q).sum()
    else:
        kd = (p * (p.log() - q.log())).sum()
    return kd.detach(), torch.autograd.grad(kd, student)[0]


def assert_equal(actual, expected, rtol=1e-10, atol=1e-13):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("k", [1, 2, 11, 36])
@pytest.mark.parametrize(
    ("convention", "name"),
    [
        *((convention, name) for convention in ("bucket", "renormalised") for name in NAMES),
        ("partial", "forward_kl"),
        ("student_full", "forward_kl"),
    ],
)
def test_equals_its_definition(convention, name, k):
    student, teacher = make_logits()
    targets = top_k(teacher, k, convention)
    assert_equal(kd_and_grad(student, targets, divergence=divergence(name)), defined(student, targets, name))


@every_divergence
def test_renormalised_softens_both_sides(name):
    student, teacher = make_logits()
    targets = top_k(teacher, 8, "renormalised")
    actual = kd_and_grad(student, targets, divergence=divergence(name), temperature=2.5)
    assert_equal(actual, defined(student, targets, name, 2.5))
    chosen = [x.gather(-1, targets.ids) for x in (student, teacher)]  # the same without the rest of the vocabulary
    torch.testing.assert_close(actual[0], kd_and_grad(*chosen, divergence=divergence(name), temperature=2.5)[0])


def test_the_teacher_may_have_a_temperature_of_its_own():
    """And T^2 is of the student's."""
    student, teacher = make_logits()
    targets = top_k(teacher, 8, "renormalised")
    settings = {"temperature": 2.0, "teacher_temperature": 0.8}
    assert_equal(kd_and_grad(student, targets, **settings), defined(student, targets, "forward_kl", *settings.values()))
    whole = kd_and_grad(student, teacher, **settings)
    assert_equal(kd_and_grad(student, top_k(teacher, 37, "renormalised"), **settings), whole)
    assert_equal(whole, kd_and_grad(student, teacher * (2.0 / 0.8), temperature=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("convention", "name"), [*(("bucket", name) for name in NAMES), *((c, "forward_kl") for c in CONVENTIONS)]
)
def test_all_tokens_are_the_whole_distribution(convention, name, dtype):
    student, teacher = make_logits(dtype=dtype)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    actual = kd_and_grad(student, top_k(teacher, 37, convention), divergence=divergence(name))
    assert_equal(actual, kd_and_grad(student, teacher, divergence=divergence(name)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("convention", "temperature"), [("bucket", 1.0), ("renormalised", 1.0), ("renormalised", 2.0)])
@every_divergence
def test_of_a_student_from_its_own_top_k_is_nothing_to_the_last_bit(name, convention, temperature):
    student, _ = make_logits(size=4, dtype=torch.float32)
    ids = student.topk(5).indices
    log_rest = student.log_softmax(-1).scatter(-1, ids, -torch.inf).logsumexp(-1)
    targets = top_k(student, 5, convention, log_rest)
    kd, grad = kd_and_grad(student, targets, divergence=divergence(name), temperature=temperature)
    assert kd == 0
    assert grad.abs().max() == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_bucket_grows_with_k_from_above_0_to_the_whole_divergence(name, size):
    """As merging outcomes only ever loses information. The weights of `adaptive_kl` depend on what was merged."""
    student, teacher = make_logits(size=size)
    kds = [
        loss_of_logits(student[:1], top_k(teacher[:1], k), divergence=divergence(name)).kd for k in (1, 3, 9, 20, 36)
    ]
    kds.append(loss_of_logits(student[:1], teacher[:1], divergence=divergence(name)).kd)
    assert kds[0] >= 0
    assert all(a <= b + 1e-12 for a, b in pairwise(kds))


def test_a_partial_sum_is_no_divergence_and_its_bucket_is():
    teacher = torch.tensor([[2.0, 1, 0, 0]])
    student = torch.tensor([[5.0, 4, 0, 0]])  # gives more to both of the top 2
    assert loss_of_logits(student, top_k(teacher, 2, "partial")).kd < -0.1
    assert loss_of_logits(student, top_k(teacher, 2, "bucket")).kd > 0


def test_bucket_is_the_default_and_sees_what_the_student_gives_to_other_tokens():
    teacher, student = torch.tensor([[4.0, 3, 0, 0]]), torch.tensor([[4.0, 3, 4, 0]])
    log_probs, ids = teacher.log_softmax(-1).topk(2)
    assert loss_of_logits(student, TopKTargets(ids, log_probs)).kd > 0.1
    assert loss_of_logits(student, TopKTargets(ids, log_probs, convention="renormalised")).kd.abs() < 1e-6


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("lead", [0.0, 10.0, 20.0, 30.0, 100.0])
def test_bucket_is_exact_in_float32_however_little_the_student_leaves_for_it(name, lead):
    student, teacher = make_logits(n=20, v=500, size=1, dtype=torch.float32)
    targets = top_k(teacher, 20)
    student.scatter_add_(-1, targets.ids, torch.full(targets.ids.shape, lead))
    kd, grad = kd_and_grad(student, targets, divergence=divergence(name))
    expected, expected_grad = defined(student, targets, name)
    torch.testing.assert_close(kd.double(), expected, rtol=1e-5, atol=0)
    assert (grad - expected_grad).norm() < 1e-5 * expected_grad.norm()


def test_the_rest_is_given_or_computed():
    student, teacher = make_logits()
    log_rest = teacher.log_softmax(-1).sort(-1, descending=True)[0][:, 5:].logsumexp(-1)
    given, computed = top_k(teacher, 5, log_rest=log_rest), top_k(teacher, 5)
    assert_equal(kd_and_grad(student, given), defined(student, given))
    assert_equal(kd_and_grad(student, given), kd_and_grad(student, computed))
    shaped = TopKTargets(given.ids[None], given.log_probs[None], given.log_rest[None])  # [b, s, k] and [b, s]
    assert torch.equal(loss_of_logits(student[None], shaped).kd, loss_of_logits(student, given).kd)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"])
def test_a_teacher_that_leaves_nothing_for_the_rest(name, given):
    student, teacher = make_logits()
    teacher[:, 5:] = -torch.inf
    log_probs = teacher[:, :5].log_softmax(-1)
    ids = torch.arange(5).expand_as(log_probs)
    targets = TopKTargets(ids, log_probs, torch.full((len(ids),), -torch.inf) if given else None)
    exact = TopKTargets(ids, log_probs, torch.full((len(ids),), -torch.inf))
    expected = defined(student, exact, name)
    assert_equal(kd_and_grad(student, targets, divergence=divergence(name)), expected, rtol=1e-9, atol=1e-12)


def test_reverse_kl_is_infinite_where_the_teacher_leaves_nothing_for_the_rest():
    student, teacher = make_logits()
    targets = top_k(teacher, 5, log_rest=torch.full((len(teacher),), -torch.inf))
    assert loss_of_logits(student, targets, divergence=divergence("reverse_kl")).kd == torch.inf


@every_convention
def test_the_student_may_have_more_tokens_than_its_teacher(convention):
    student, _ = make_logits(v=50)
    _, teacher = make_logits(v=37)
    targets = top_k(teacher, 6, convention)
    assert_equal(kd_and_grad(student, targets), defined(student, targets))


@every_convention
def test_order_of_the_tokens_is_free(convention):
    student, teacher = make_logits()
    targets = top_k(teacher, 6, convention)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    again = TopKTargets(targets.ids[:, shuffled], targets.log_probs[:, shuffled], convention=convention)
    assert_equal(kd_and_grad(student, again), kd_and_grad(student, targets))


@every_convention
def test_beside_the_cross_entropy_over_chunks(convention):
    """All parts of the gradient meet in one buffer, here 4 rows at a time, of which some are not labelled."""
    student, teacher = make_logits()
    targets = top_k(teacher, 6, convention)
    labels = torch.arange(29) % 37
    labels[::3] = -100
    student.requires_grad_()
    settings = {"ce_weight": 0.3, "kd_weight": 0.7}
    loss = loss_of_logits(student, targets, labels, 19, chunk_size=4, label_smoothing=0.1, **settings)
    (grad,) = torch.autograd.grad(loss.total, student)
    mask = labels != -100
    ce = torch.nn.functional.cross_entropy(student[mask], labels[mask], label_smoothing=0.1)
    (ce_grad,) = torch.autograd.grad(ce, student)
    kd, kd_grad = defined(student[mask], TopKTargets(targets.ids[mask], targets.log_probs[mask], None, convention))
    expected = 0.3 * ce_grad
    expected[mask] += 0.7 * kd_grad / 19
    assert_equal((loss.total.detach(), grad), (0.3 * ce.detach() + 0.7 * kd / 19, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cache_in_half_precision_is_read_as_what_it_says(dtype):
    student, teacher = make_logits(dtype=torch.float32)
    targets = top_k(teacher, 5)
    half = TopKTargets(targets.ids, targets.log_probs.to(dtype))
    assert_equal(kd_and_grad(student, half), defined(student, half), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("convention", "settings", "reason"),
    [
        *(
            (convention, {"divergence": function}, f"Top-k targets, {convention}: defined for forward_kl only")
            for convention in ("partial", "student_full")
            for function in (divergence("reverse_kl"), divergence("jsd", beta=0.1), by_autograd(lambda p, q: q[:, 0]))
        ),
        *(
            (convention, {"temperature": 2.0}, "temperature=2.0: the top k at temperature 1 do not tell")
            for convention in ("bucket", "partial", "student_full")
        ),
        *((convention, {"teacher_share": 0.5}, "the teacher's whole distribution") for convention in CONVENTIONS),
        *((convention, {"label_margin": 0.1}, "the teacher's whole distribution") for convention in CONVENTIONS),
        *(
            (convention, {"with_metrics": True}, "Metrics compare with the teacher's whole")
            for convention in CONVENTIONS
        ),
    ],
)
def test_refusals(convention, settings, reason):
    student, teacher = make_logits()
    with pytest.raises(ValueError, match=reason):
        loss_of_logits(student, top_k(teacher, 5, convention), **settings)


def test_nothing_labelled_is_zero_with_a_graph():
    student, teacher = make_logits()
    student.requires_grad_()
    loss = loss_of_logits(student, top_k(teacher, 5), torch.full((29,), -100))
    loss.total.backward()
    assert loss.total == 0
    assert student.grad.abs().max() == 0


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="convention=buckets: known are bucket, renormalised, partial, student_full"):
        top_k(make_logits(4, 9)[1], 3, "buckets")


@every_convention
def test_padding_of_the_student_s_vocabulary_is_not_among_the_others(convention):
    student, teacher = make_logits(9, 23)
    teacher = teacher[:, :19]
    whole, fewer = top_k(teacher, 19, convention), top_k(teacher, 5, convention)
    for targets, expected in ((whole, kd_and_grad(student, teacher)), (fewer, kd_and_grad(student[:, :19], fewer))):
        kd, grad = kd_and_grad(student, replace(targets, vocab_size=19))
        torch.testing.assert_close(kd, expected[0])
        torch.testing.assert_close(grad[:, :19], expected[1][:, :19])
        assert grad[:, 19:].abs().max() == 0


@pytest.mark.parametrize("k", [23, 12])
@every_convention
def test_tokens_that_only_the_teacher_has_get_no_probability(convention, k):
    """As of whole distributions: what both have adds up to 1. Of the tokens in a row so many are the teacher's own."""
    student, teacher = make_logits(9, 23)
    teacher = teacher.clone()
    teacher[:3, 19:] += 4
    targets = replace(top_k(teacher, k, convention), vocab_size=23)
    is_own = targets.ids >= 19
    assert (targets.log_probs.exp() * is_own).sum(-1)[:3].min() > 0.1
    log_both = torch.log1p(-(targets.log_probs.exp() * is_own).sum(-1))
    shared = replace(
        targets,
        ids=targets.ids.masked_fill(is_own, -1),
        log_probs=(targets.log_probs - log_both[:, None]).masked_fill(is_own, -torch.inf),
        log_rest=None,
    )
    expected = kd_and_grad(student[:, :19], teacher[:, :19] if k == 23 else shared)
    for found, wanted in zip(kd_and_grad(student[:, :19], targets), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


COMPARISONS = [
    *(("bucket", name) for name in NAMES),
    *(("renormalised", name) for name in NAMES),
    ("partial", "forward_kl"),
    ("student_full", "forward_kl"),
]


@pytest.mark.parametrize("absent", [-1, 37, 1000])  # 37 and more: tokens that only the teacher has
@pytest.mark.parametrize(("convention", "name"), COMPARISONS)
def test_rows_may_have_less_than_k_tokens(convention, name, absent):
    """As of a top p. Each is as if it were alone, with as many as it has."""
    student, teacher = make_logits(n=7)
    targets = top_k(teacher, 36, convention)
    counts = [36, 1, 2, 5, 12, 35, 3]
    is_token = torch.arange(36) < torch.tensor(counts)[:, None]
    few = TopKTargets(
        targets.ids.masked_fill(~is_token, absent).int(),
        targets.log_probs.masked_fill(~is_token, -torch.inf),
        convention=convention,
    )
    settings = {"divergence": divergence(name)}
    alone = [
        kd_and_grad(student[i : i + 1], top_k(teacher[i : i + 1], count, convention), **settings)
        for i, count in enumerate(counts)
    ]
    expected = sum(kd for kd, _ in alone), torch.cat([grad for _, grad in alone])
    assert_equal(kd_and_grad(student, few, **settings), expected)
    given = replace(few, log_rest=torch.log1p(-few.log_probs.exp().sum(-1).clamp(max=1)))
    assert_equal(kd_and_grad(student, given, **settings), expected)


@pytest.mark.parametrize(("convention", "name"), COMPARISONS)
def test_a_row_without_any_token_adds_nothing(convention, name):
    student, teacher = make_logits(n=4)
    targets = top_k(teacher, 6, convention)
    settings = {"divergence": divergence(name)}
    kd, grad = kd_and_grad(student[1:], top_k(teacher[1:], 6, convention), **settings)
    targets.ids[0] = -1
    found, found_grad = kd_and_grad(student, targets, **settings)
    torch.testing.assert_close(found, kd)
    torch.testing.assert_close(found_grad[1:], grad)
    torch.testing.assert_close(found_grad[0], torch.zeros_like(student[0]))


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_the_error_falls_with_k_as_the_rest_does(size):
    """That of the gradient is less than twice the rest."""
    student, teacher = make_logits(n=40, v=500, size=size)
    whole, whole_grad = kd_and_grad(student, teacher)
    value_errors, grad_errors, rests = [], [], []
    for k in (1, 4, 16, 64, 256, 499):
        targets = top_k(teacher, k)
        kd, grad = kd_and_grad(student, targets)
        rests.append(1 - targets.log_probs.exp().sum(-1).mean())
        value_errors.append((whole - kd) / 40)
        grad_errors.append((grad - whole_grad).abs().sum(-1).mean())
    for errors in (value_errors, grad_errors):
        assert all(a > b >= 0 for a, b in pairwise(errors))
    assert all(error < 2 * rest for error, rest in zip(grad_errors, rests, strict=True))
    assert grad_errors[-1] < 1e-3 * grad_errors[0]


@pytest.mark.parametrize("lead", [-30.0, 0.0, 30.0, 100.0])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_exact_in_float32_whatever_the_student_gives_to_its_padding(convention, lead):
    student, teacher = make_logits(n=20, v=500, size=1, dtype=torch.float32)
    student[:, 480:] += lead
    targets = replace(top_k(teacher[:, :480], 20, convention), vocab_size=480)
    assert_padding_gets_nothing(kd_and_grad(student, targets), defined(student[:, :480], targets))


def test_a_student_that_rules_all_others_out():
    student, teacher = make_logits(dtype=torch.float32)
    targets = TopKTargets(torch.arange(5).expand(29, 5), teacher.log_softmax(-1)[:, :5])
    head = nn.Linear(37, 37, dtype=torch.float32)
    nn.init.eye_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.where(torch.arange(37) < 5, 0, -torch.inf))
    student.requires_grad_()
    settings = {"kd_weight": 1.0, "divergence": divergence("jsd")}
    loss = distillation_loss(student, head, torch.zeros(29, dtype=torch.long), 1, targets, ce_weight=0.0, **settings)
    (grad,) = torch.autograd.grad(loss.total, student)
    expected, expected_grad = defined(student + head.bias.clamp(min=-100), targets, "jsd")
    torch.testing.assert_close(loss.kd.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-7)


def known(teacher, labels, kind, **changes):
    """Logits as `Targets`, a top k or draws, with what metrics need."""
    log_p = teacher.log_softmax(-1)
    metrics = {
        "entropy": torch.special.entr(log_p.exp()).sum(-1),
        "label_log_probs": log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "top_ids": log_p.argmax(-1),
    }
    log_probs, ids = log_p.topk(teacher.shape[-1])
    if kind == "samples":
        return SampledTargets(ids, log_probs.exp(), **(metrics | changes))
    return TopKTargets(ids, log_probs, **(metrics | changes))


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize("kind", ["top k", "samples"])
def test_metrics_are_those_of_the_whole_distribution(kind, chunk_size):
    student, teacher = make_logits(v=41)
    teacher = teacher[:, :37]
    student[:9, :37] += 3 * teacher[:9]  # so that some agree
    student[5:12, 40] = 50  # entries that only the student has are not looked at for agreement
    labels = (torch.arange(29) % 37).masked_fill(torch.arange(29) % 5 == 2, -100)
    expected = loss_of_logits(student, teacher, labels, 19, with_metrics=True)
    targets = known(teacher, labels, kind, vocab_size=37)
    found = loss_of_logits(student, targets, labels, 19, chunk_size=chunk_size, with_metrics=True)
    assert 0 < found.agreement < 1
    torch.testing.assert_close(vars(found), vars(expected), rtol=1e-10, atol=1e-12)
    if kind == "top k":  # which has the likeliest token among its own
        again = loss_of_logits(student, replace(targets, top_ids=None), labels, 19, with_metrics=True)
        assert again.agreement == found.agreement


@pytest.mark.parametrize("missing", ["entropy", "label_log_probs"])
def test_metrics_of_which_too_little_is_known_are_refused(missing):
    student, teacher = make_logits()
    labels = torch.zeros(29, dtype=torch.long)
    with pytest.raises(ValueError, match="have to tell its entropy, label_log_probs and top_ids"):
        loss_of_logits(student, known(teacher, labels, "top k", **{missing: None}), labels, with_metrics=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": torch.zeros(4, 3)}, r"ids are \[4, 2\], log_probs \[4, 3\] instead of \[4, 2\]"),
        ({"log_rest": torch.zeros(4, 1)}, r"ids are \[4, 2\], log_rest \[4, 1\] instead of \[4\]"),
        ({"entropy": torch.zeros(3)}, r"ids are \[4, 2\], entropy \[3\] instead of \[4\]"),
    ],
)
def test_shapes_that_do_not_match_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TopKTargets(**({"ids": torch.zeros(4, 2, dtype=torch.long), "log_probs": torch.zeros(4, 2)} | changes))
