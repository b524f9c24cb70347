"""A teacher known by draws: an estimate of the forward KL and of its gradient, unbiased."""

from dataclasses import replace

import pytest
import torch
from problems import assert_padding_gets_nothing, kd_and_grad, loss_of_logits, make_logits

from kdtune.losses import SampledTargets, by_autograd, divergence


def entropy(teacher):
    return torch.distributions.Categorical(logits=teacher).entropy()


def draw(teacher, num_samples, power, seed=0):
    """From p^power / Z, with replacement."""
    p = teacher.softmax(-1)
    proposal = (power * teacher.log_softmax(-1)).softmax(-1)
    ids = torch.multinomial(proposal, num_samples, True, generator=torch.Generator().manual_seed(seed))
    weights = (p / proposal).gather(-1, ids) / num_samples
    return SampledTargets(ids, weights, entropy(teacher))


def defined(student, targets):
    """The sum over the rows and its gradient by autograd."""
    student = student.detach().double().requires_grad_()
    terms = targets.weights.double() * student.log_softmax(-1).gather(-1, targets.ids.clamp(min=0))
    kd = -targets.entropy.sum() - terms.sum()
    return kd.detach(), torch.autograd.grad(kd, student)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [1.0, 0.7])
def test_equals_its_definition(power, dtype):
    student, teacher = make_logits(dtype=dtype)
    targets = draw(teacher, 12, power)
    assert targets.weights.sum(-1).std() > 0.01 or power == 1  # their sum is not made to be 1
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for found, expected in zip(kd_and_grad(student, targets), defined(student, targets), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_every_token_by_its_probability_is_the_whole_distribution():
    student, teacher = make_logits()
    p, ids = teacher.softmax(-1).sort(-1)
    for found, expected in zip(
        kd_and_grad(student, SampledTargets(ids, p, entropy(teacher))), kd_and_grad(student, teacher), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_the_mean_over_draws_is_the_divergence_and_its_gradient(power):
    """Within 4.5 standard errors for each of 38 numbers: by chance, one seed in 4,000 would fail."""
    (student,), (teacher,) = make_logits(n=1, size=1.5)
    repeats = 40_000
    student, teacher = student.expand(repeats, -1), teacher.expand(repeats, -1)
    kd, grads = kd_and_grad(student, draw(teacher, 12, power))
    expected, expected_grad = kd_and_grad(student[:1], teacher[:1])
    standard_errors = grads.std(0) / repeats**0.5
    assert standard_errors.max() < 0.005 * expected_grad.abs().max()  # which is to see a bias of a few percent
    assert ((grads.mean(0) - expected_grad[0]) / standard_errors).abs().max() < 4.5
    values = torch.stack([loss_of_logits(student[:50], draw(teacher[:50], 12, power, seed)).kd for seed in range(200)])
    error = values.std() / 200**0.5
    assert kd > 0
    assert abs(values.mean() - 50 * expected) < 4.5 * error
    assert error < 0.05 * 50 * expected


def test_fewer_tokens_than_columns():
    """-1, and what the student does not have; the weights of such are not looked at."""
    student, teacher = make_logits(n=3)
    targets = draw(teacher, 4, 1.0)
    more = torch.tensor([[-1, 37], [1000, -1], [-1, -1]])
    padded = SampledTargets(
        torch.cat([targets.ids, more], -1).int(),
        torch.cat([targets.weights, torch.tensor([[0.5, 0.3]] * 3)], -1),
        targets.entropy,
    )
    for found, expected in zip(kd_and_grad(student, padded), kd_and_grad(student, targets), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("lead", [-30.0, 0.0, 30.0, 100.0])
def test_padding_of_the_student_s_vocabulary_gets_no_probability(lead):
    student, teacher = make_logits(v=50, dtype=torch.float32)
    student[:, 37:] += lead
    targets = replace(draw(teacher[:, :37], 12, 1.0), vocab_size=37)
    assert_padding_gets_nothing(kd_and_grad(student, targets), defined(student[:, :37], targets))


def test_beside_the_cross_entropy_over_chunks():
    student, teacher = make_logits()
    targets = draw(teacher, 5, 0.7)
    labels = torch.arange(29) % 37
    labels[::3] = -100
    mask = labels != -100
    student.requires_grad_()
    settings = {"ce_weight": 0.3, "kd_weight": 0.7, "chunk_size": 4, "z_loss": 0.01}
    loss = loss_of_logits(student, targets, labels, 19, **settings)
    (grad,) = torch.autograd.grad(loss.total, student)
    ce = torch.nn.functional.cross_entropy(student[mask], labels[mask])
    ce = ce + 0.01 * student[mask].logsumexp(-1).square().mean()
    (ce_grad,) = torch.autograd.grad(ce, student)
    kd, kd_grad = defined(
        student[mask], SampledTargets(targets.ids[mask], targets.weights[mask], targets.entropy[mask])
    )
    expected = 0.3 * ce_grad
    expected[mask] += 0.7 * kd_grad / 19
    torch.testing.assert_close(loss.total.detach(), 0.3 * ce.detach() + 0.7 * kd / 19, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"divergence": divergence("reverse_kl")}, "Sampled targets: defined for forward_kl only"),
        ({"divergence": divergence("adaptive_kl")}, "Sampled targets: defined for forward_kl only"),
        ({"divergence": by_autograd(lambda p, q: q[:, 0])}, "Sampled targets: defined for forward_kl only"),
        ({"temperature": 2.0}, "temperature=2.0: draws at temperature 1 do not tell"),
        ({"teacher_temperature": 0.5}, "temperature=1.0, teacher_temperature=0.5: draws at temperature 1"),
        ({"teacher_share": 0.5}, "need the teacher's whole distribution, not a sample"),
        ({"label_margin": 0.1}, "need the teacher's whole distribution, not a sample"),
        ({"with_metrics": True}, "have to tell its entropy, label_log_probs and top_ids"),
    ],
)
def test_refusals(settings, reason):
    student, teacher = make_logits()
    with pytest.raises(ValueError, match=reason):
        loss_of_logits(student, draw(teacher, 5, 1.0), **settings)
