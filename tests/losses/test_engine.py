"""What the engine does with heads, number formats and settings, against dense autograd; and what it costs."""

import pytest
import torch
from problems import chunked, dense_loss, make_problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdtune.losses import IGNORE, default_chunk_size, distillation_loss, divergence


class Head(nn.Linear):
    """As of Gemma 2 (a soft cap) or Granite (a scale)."""

    def __init__(self, *args, logit_scale=1.0, soft_cap=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.logit_scale, self.soft_cap = logit_scale, soft_cap

    def factors(self, hidden):
        return [(hidden, self.weight)]

    def forward(self, x):
        logits = super().forward(x) * self.logit_scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


class AdaptedHead(nn.Module):
    """A frozen weight and a low-rank adapter."""

    def __init__(self, linear, rank=3, scale=2.0):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight.requires_grad_(False), linear.bias, scale
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, dtype=linear.weight.dtype))
        self.b = nn.Parameter(torch.randn(linear.out_features, rank, dtype=linear.weight.dtype))

    def factors(self, hidden):
        return [(hidden, self.weight), (hidden @ self.a.T * self.scale, self.b)]

    def forward(self, x):
        return x @ (self.weight + self.scale * self.b @ self.a).T


def like(head, linear):
    head.load_state_dict(linear.state_dict())
    return head


def assert_same(problem, expected, loss, inputs, rtol=1e-10):
    torch.testing.assert_close(loss.total, expected, rtol=rtol, atol=1e-12)
    grads, expected_grads = torch.autograd.grad(loss.total, inputs), torch.autograd.grad(expected, inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("changes", [{"soft_cap": 2.0}, {"logit_scale": 0.3}, {"soft_cap": 1.5, "logit_scale": 2.0}])
@pytest.mark.parametrize("bias", [False, True])
def test_heads_with_a_scale_or_a_soft_cap(changes, bias):
    hidden, head, teacher_hidden, teacher_head, labels = make_problem(bias=bias, v_t=110)
    head = like(Head(31, 123, bias=bias, dtype=torch.float64, **changes), head)
    teacher_head = like(Head(17, 110, bias=bias, dtype=torch.float64, soft_cap=3.0), teacher_head)
    problem = (hidden, head, teacher_hidden, teacher_head, labels)
    expected, _, _ = dense_loss(*problem, 70, 0.4, 1.5)
    assert_same(
        problem, expected, chunked(problem, 70, 0.4, temperature=1.5, chunk_size=9), (hidden, *head.parameters())
    )


def test_a_head_with_an_adapter():
    hidden, head, teacher_hidden, teacher_head, labels = make_problem()
    head = AdaptedHead(head)
    problem = (hidden, head, teacher_hidden, teacher_head, labels)
    expected, _, _ = dense_loss(*problem, 70, 0.4, 1.0)
    assert_same(problem, expected, chunked(problem, 70, 0.4, chunk_size=9), (hidden, head.a, head.b))
    chunked(problem).total.backward()
    assert head.weight.grad is None


def test_a_head_tied_to_the_embedding():
    _, head, teacher_hidden, teacher_head, labels = make_problem()
    tokens = labels.clamp(min=0)

    def problem():
        return nn.functional.embedding(tokens, head.weight).tanh(), head, teacher_hidden, teacher_head, labels

    expected, _, _ = dense_loss(*problem(), 70, 0.4, 1.0)
    assert_same(problem, expected, chunked(problem(), 70, 0.4, chunk_size=9), (head.weight,))


def test_a_single_labelled_token():
    problem = make_problem()
    labels = torch.full_like(problem[-1], IGNORE)
    labels[1, 20] = 5
    problem = (*problem[:-1], labels)
    expected, _, _ = dense_loss(*problem, 1, 0.4, 1.0)
    assert_same(problem, expected, chunked(problem, 1, 0.4), (problem[0], problem[1].weight))


def test_smoothing_and_z_loss():
    problem = make_problem()
    hidden, head, _, _, labels = problem
    logits = head(hidden)[labels != IGNORE]
    ce = nn.functional.cross_entropy(logits, labels[labels != IGNORE], label_smoothing=0.2)
    expected = ce + 0.03 * logits.logsumexp(-1).square().mean()
    loss = chunked(problem, kd_ratio=0.0, label_smoothing=0.2, z_loss=0.03, chunk_size=9)
    plain = chunked(problem, kd_ratio=0.0)
    assert_same(problem, expected, loss, (hidden, head.weight))
    torch.testing.assert_close(loss.ce, plain.ce)  # what is logged stays the cross-entropy


def target_loss(problem, target):
    """KL from `target(student logits, teacher logits, labels)`, which has no gradient, to the student."""
    hidden, head, teacher_hidden, teacher_head, labels = problem
    scored = labels != IGNORE
    logits = head(hidden)[scored]
    log_p = target(logits.detach(), teacher_head(teacher_hidden)[scored].detach(), labels[scored])
    return nn.functional.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="batchmean")


def test_a_target_between_student_and_teacher():
    problem = make_problem()
    expected = target_loss(problem, lambda student, teacher, _: (0.3 * teacher + 0.7 * student).log_softmax(-1))
    assert_same(problem, expected, chunked(problem, kd_ratio=1.0, teacher_share=0.3), (problem[0], problem[1].weight))


@pytest.mark.parametrize("margin", [0.05, 0.2, 0.9])
def test_a_teacher_in_which_the_label_wins(margin):
    problem = make_problem()
    labels = problem[-1]
    teacher_logits = problem[3](problem[2])
    labels[0] = teacher_logits[0].argmax(-1)  # right, and right beyond the margin where the teacher is sure
    with torch.no_grad():
        problem[3].weight.mul_(torch.linspace(0.2, 3, 123, dtype=torch.float64)[:, None])
    seen = []

    def corrected(_, teacher, labels):
        p = teacher.softmax(-1)
        rows = torch.arange(len(p))
        others = p.clone()
        others[rows, labels] = -1
        # Mixed with the label by the least share, found by bisection, that lets it win; where the teacher is right, its
        # label gains the margin.
        right = p[rows, labels] >= others.amax(-1)
        low, high = torch.zeros(len(p), dtype=p.dtype), torch.ones(len(p), dtype=p.dtype)
        wanted = torch.where(right, (p[rows, labels] + margin).clamp(max=1), 0)
        for _ in range(60):
            share = (low + high) / 2
            label_p = p[rows, labels] * (1 - share) + share
            enough = torch.where(right, label_p >= wanted, label_p - others.amax(-1) * (1 - share) >= margin)
            low, high = torch.where(enough, low, share), torch.where(enough, share, high)
        seen.append(right)
        p = p * (1 - high)[:, None]
        p[rows, labels] += high
        return p.log()

    expected = target_loss(problem, corrected)
    assert 0 < seen[0].double().mean() < 1
    loss = chunked(problem, kd_ratio=1.0, label_margin=margin, chunk_size=9)
    assert_same(problem, expected, loss, (problem[0], problem[1].weight), rtol=1e-8)


def test_balance_gives_the_divergence_the_size_of_the_cross_entropy():
    problem = make_problem()
    plain, balanced = chunked(problem, kd_ratio=0.3), chunked(problem, kd_ratio=0.3, balance=True)
    assert (balanced.ce, balanced.kd) == (plain.ce, plain.kd)
    torch.testing.assert_close(balanced.kd_factor, plain.ce / plain.kd)
    torch.testing.assert_close(balanced.total, plain.ce)
    ce, kd = (torch.autograd.grad(chunked(problem, kd_ratio=ratio).total, problem[0])[0] for ratio in (0.0, 1.0))
    (grad,) = torch.autograd.grad(balanced.total, problem[0])
    torch.testing.assert_close(grad, 0.7 * ce + 0.3 * plain.ce / plain.kd * kd)
    assert plain.kd_factor == 1


def test_huge_logits_are_as_good_as_certainty():
    hidden, head, teacher_hidden, teacher_head, labels = make_problem(dtype=torch.float32)
    with torch.no_grad():
        teacher_head.weight *= 1e6
    loss = chunked((hidden * 1e6, head, teacher_hidden, teacher_head, labels))
    assert torch.isfinite(torch.stack([loss.total, *torch.autograd.grad(loss.total, hidden)[0].aminmax()])).all()


def in_float64(problem):
    hidden, head, teacher_hidden, teacher_head, labels = problem
    heads = [nn.Linear(h.in_features, h.out_features, bias=False, dtype=torch.float64) for h in (head, teacher_head)]
    like(heads[0], head), like(heads[1], teacher_head)
    return hidden.detach().double().requires_grad_(), heads[0], teacher_hidden.double(), heads[1], labels


def relative_errors(dtype, closeness):
    """KL, and errors of both gradients against float64 from the same rounded inputs, student close to the teacher."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 600, 64, generator=generator).to(dtype).requires_grad_()
    teacher_hidden = (hidden.detach() + closeness * torch.randn(hidden.shape, generator=generator)).to(dtype)
    head = nn.Linear(64, 1000, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(0.25 * torch.randn(1000, 64, generator=generator))
    labels = torch.randint(1000, (1, 600), generator=generator)
    loss = chunked((hidden, head, teacher_hidden, head, labels), kd_ratio=1.0, chunk_size=64)
    grads = torch.autograd.grad(loss.total, (hidden, head.weight))

    problem = in_float64((hidden, head, teacher_hidden, head, labels))
    exact, _, _ = dense_loss(*problem, 600, 1.0, 1.0)
    exact_grads = torch.autograd.grad(exact, (problem[0], problem[1].weight))
    torch.testing.assert_close(loss.kd.double(), exact, rtol=1e-3, atol=0)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(grads, exact_grads, strict=True)]
    return exact.item(), *errors


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.003), (torch.float16, 0.01)])
@pytest.mark.parametrize("closeness", [1.0, 0.1, 0.02])
def test_low_precision_gradients_stay_near_float64(closeness, dtype, bound):
    """Where logits are rounded to bf16, the error reaches tens of percent as the student approaches the teacher.

    The gradient of float16 hidden states is float16, whose smallest numbers have few digits.
    """
    kl, *errors = relative_errors(dtype, closeness)
    assert closeness > 0.02 or kl < 1e-3
    assert max(errors) < bound


@pytest.mark.parametrize("setting", ["none", "ieee", "bf16"])
def test_low_precision_products_leave_the_setting_alone(setting):
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = setting
    try:
        chunked(make_problem(dtype=torch.bfloat16)).total.backward()
        assert backend.fp32_precision == setting
    finally:
        backend.fp32_precision = before


def test_float16_gradients_wait_for_the_scale_of_the_loss():
    """With so many tokens they are below the smallest float16; a gradient scaler multiplies the loss to avoid that."""
    problem = make_problem(dtype=torch.float16)
    scaled, exact = (
        torch.autograd.grad(2.0**16 * chunked(p, num_tokens=10**6).total, (p[0], p[1].weight))
        for p in (problem, in_float64(problem))
    )
    for grad, exact_grad in zip(scaled, exact, strict=True):
        assert grad.dtype == torch.float16
        assert (grad.double() - exact_grad).norm() / exact_grad.norm() < 1e-3


def test_autocast_around_it_changes_nothing():
    problem = make_problem(dtype=torch.float32)
    expected = torch.autograd.grad(chunked(problem).total, problem[0])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked(problem)
    assert torch.equal(torch.autograd.grad(loss.total, problem[0])[0], expected)


@pytest.mark.parametrize("trained_head", [True, False])
def test_no_product_is_made_twice(trained_head):
    """Three of the student's (two if its head is frozen) and one of the teacher's, over labelled tokens only."""
    problem = make_problem(dtype=torch.float32)
    problem[1].weight.requires_grad_(trained_head)
    num_labels = int((problem[-1] != IGNORE).sum())
    with FlopCounterMode(display=False) as counter:
        chunked(problem, chunk_size=9).total.backward()
    assert counter.get_total_flops() == 2 * num_labels * 123 * (17 + (3 if trained_head else 2) * 31)


class LargeTensors(TorchDispatchMode):
    """Storages of at least `size` bytes that were made while it was active."""

    def __init__(self, size, there_before):
        super().__init__()
        self.size, self.made = size, {}
        self.there_before = {tensor.untyped_storage().data_ptr() for tensor in there_before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage and storage.nbytes() >= self.size and storage.data_ptr() not in self.there_before:
                self.made[storage.data_ptr()] = storage  # kept, so that no other is made at its address
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_two_blocks_of_logits_are_all_that_is_large(name, dtype):
    vocabulary, chunk = 60_000, 128
    problem = make_problem(dtype=dtype, v=vocabulary, b=2, s=200)
    with LargeTensors(4 * vocabulary * chunk // 3, (problem[1].weight, problem[3].weight)) as large:
        chunked(problem, chunk_size=chunk, divergence=divergence(name)).total.backward()
    assert [storage.nbytes() for storage in large.made.values()] == [4 * vocabulary * chunk] * 2


def test_chunks_follow_the_vocabulary():
    sizes = [default_chunk_size(v, v, torch.device("cpu")) for v in (1_000, 32_000, 128_256, 10_000_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size * 2 * 4 * v <= 2**28 for size, v in zip(sizes, (1_000, 32_000, 128_256), strict=False))
    assert sizes[-1] == 64
    assert default_chunk_size(128_256, 128_256, torch.device("cuda")) == 1_024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_compiled_equals_eager(dtype):
    problem = make_problem(dtype=dtype, v=70_001)
    for changes in ({}, {"temperature": 2.0}, {"with_metrics": True, "label_smoothing": 0.1, "z_loss": 1e-3}):
        eager, compiled = chunked(problem, **changes), chunked(problem, **changes, compile=True)
        for a, b in zip(vars(compiled).values(), vars(eager).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        inputs = (problem[0], problem[1].weight)
        for a, b in zip(
            torch.autograd.grad(compiled.total, inputs), torch.autograd.grad(eager.total, inputs), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_margin": 1.0}, "label_margin=1.0"),
        ({"teacher_share": 0.0}, "teacher_share=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0.*must be positive"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        chunked(make_problem(), **changes)


def test_without_a_teacher_nothing_can_be_compared():
    hidden, head, _, _, labels = make_problem()
    settings = {"kd_weight": 0.1, "balance": True, "temperature": 2.0, "teacher_share": 0.5, "label_margin": 0.1}
    for changes in (*({name: value} for name, value in settings.items()), {"with_metrics": True}):
        with pytest.raises(ValueError, match="teacher"):
            distillation_loss(hidden, head, labels, 9, **changes)


def test_positions_that_do_not_match_are_refused():
    hidden, head, teacher_hidden, teacher_head, labels = make_problem()
    for problem in (
        (hidden, head, teacher_hidden.transpose(0, 1), teacher_head, labels),
        (hidden, head, teacher_hidden[:, 1:], teacher_head, labels),
        (hidden, head, teacher_hidden, teacher_head, labels[:, :-1]),
    ):
        with pytest.raises(ValueError, match="positions do not match: labels"):
            chunked(problem)


def test_a_head_that_does_not_say_what_it_computes_is_refused():
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    hidden, head, teacher_hidden, teacher_head, labels = make_problem()
    shifted = like(Shifted(31, 123, bias=False, dtype=torch.float64), head)
    with pytest.raises(ValueError, match="the head is a Shifted"):
        chunked((hidden, shifted, teacher_hidden, teacher_head, labels))


def test_a_second_derivative_is_refused_rather_than_wrong():
    problem = make_problem()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(chunked(problem).total, problem[0], create_graph=True)


def test_an_infinite_term_without_weight_does_no_harm():
    hidden, head, teacher_hidden, teacher_head, labels = make_problem(bias=True)
    with torch.no_grad():
        teacher_head.bias[:9] = -torch.inf
    problem = (hidden, head, teacher_hidden, teacher_head, labels)
    loss, plain = chunked(problem, kd_ratio=0.0, divergence=divergence("reverse_kl")), chunked(problem, kd_ratio=0.0)
    assert loss.kd == torch.inf
    assert loss.total == plain.total
    grads = (torch.autograd.grad(x.total, (hidden, head.weight)) for x in (loss, plain))
    for a, b in zip(*grads, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)
