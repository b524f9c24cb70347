"""Values of other tools' losses on fixed logits, and the settings under which ours are the same."""

import json
import re
from pathlib import Path

import pytest
import torch
from problems import identity, loss_of_logits

from kdtune import data
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.losses import CELossConfig, KDLossConfig, TopKTargets, divergence

PEERS = json.loads((Path(__file__).parent / "peer_values.json").read_text())
STUDENT, TEACHER = torch.tensor(PEERS["student_logits"]), torch.tensor(PEERS["teacher_logits"])  # [2, 4, 4]


def kd(labels, name="forward_kl", temperature=1.0, dtype=torch.float32, **parameters):
    """The mean over labelled tokens. None of these tools but Automodel has the factor T^2."""
    return loss_of_logits(
        STUDENT.to(dtype),
        TEACHER.to(dtype),
        labels,
        int((labels >= 0).sum()),
        divergence=divergence(name, **parameters),
        temperature=temperature,
        scale_by_temperature_squared=False,
    ).kd.item()


def teacher_entropy(labels):
    return torch.distributions.Categorical(logits=TEACHER.double()[labels >= 0]).entropy().mean().item()


def ours(function, parameters, labels):
    """What a peer's function computes, made of ours."""
    share = parameters.get("lam", 0.9 if function.startswith("distillm.") else 0.5)
    peer, function = function.split(".", 1)
    if peer in ("trl", "liger"):  # the ends of beta are special cases: a forward and a reverse KL, not their limit, 0
        beta, temperature = parameters["beta"], parameters["temperature"]
        if beta in (0, 1):
            return kd(labels, "forward_kl" if beta == 0 else "reverse_kl", temperature)
        return kd(labels, "jsd", temperature, beta=beta)
    # A "forward KL" of torchtune and DistiLLM is a cross-entropy, also where it is a part: the teacher's entropy more.
    if "forward_kl" in function.lower() or "ForwardKL" in function:
        skewed = "skewed" in function
        return (kd(labels, "skew_forward_kl", alpha=0.1) if skewed else kd(labels)) + teacher_entropy(labels)
    if "symmetric" in function.lower():  # the weight is that of the reverse KL
        return kd(labels, "symmetric_kl", beta=1 - share) + (1 - share) * teacher_entropy(labels)
    if function == "js_distance":  # lam weights the student in the mixture
        return kd(labels, "jsd", beta=1 - share)
    if function == "skewed_reverse_kl":
        return kd(labels, "skew_reverse_kl", alpha=0.1)
    return kd(labels, "total_variation" if function == "tv_distance" else "reverse_kl")


@pytest.mark.parametrize("key", PEERS["values"])
def test_values_of_torchtune_trl_liger_and_distillm(key):
    call, label_set = key.split("|")
    function = call.split()[0]
    parameters = {name: float(x) for name, x in re.findall(r"(\w+)'?[=:] ?([\d.]+)", call)}
    labels = torch.tensor(PEERS["labels"][label_set])
    assert ours(function, parameters, labels) == pytest.approx(PEERS["values"][key], abs=1e-6)


def test_the_teachers_entropy():
    labels = torch.tensor(PEERS["labels"]["all"])
    assert teacher_entropy(labels) == pytest.approx(PEERS["teacher_entropy"], abs=1e-6)
    metrics = loss_of_logits(STUDENT, TEACHER, labels, 8, with_metrics=True)
    assert metrics.teacher_entropy.item() == pytest.approx(PEERS["teacher_entropy"], abs=1e-6)


@pytest.mark.parametrize("function", PEERS["published"])
def test_values_that_torchtune_publishes_for_bf16(function):
    labels = torch.tensor(PEERS["labels"]["all"])
    entropy = teacher_entropy(labels)
    value = {
        "ForwardKL": kd(labels, dtype=torch.bfloat16) + entropy,
        "ReverseKL": kd(labels, "reverse_kl", dtype=torch.bfloat16),
        "SymmetricKL": kd(labels, "symmetric_kl", dtype=torch.bfloat16) + entropy / 2,
    }[function]
    assert value == pytest.approx(PEERS["published"][function], abs=0.01)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_value_known_in_closed_form(name):
    case = PEERS["closed_form"]
    student, teacher = (torch.tensor([case[role]], dtype=torch.float64).log() for role in ("student", "teacher"))
    value = loss_of_logits(student, teacher, divergence=divergence(name)).kd.item()
    assert value == pytest.approx(case["kl"], rel=1e-12)


@pytest.mark.parametrize("case", PEERS["automodel"])
def test_cases_of_automodel(case):
    student, teacher = (torch.tensor(case[role], dtype=torch.float64) for role in ("student", "teacher"))
    labels = torch.tensor(case["labels"])
    loss = loss_of_logits(student, teacher, labels, case["num_tokens"], temperature=case["temperature"])
    assert loss.kd.item() == pytest.approx(case["value"], rel=1e-10)


# NVIDIA's tools, each run on these logits: nvidia-modelopt 0.47 (its core, and `mcore`, its plugin for Megatron),
# Automodel, NeMo-Aligner, NeMo-RL, and Megatron-LM's cached logits. Loss, and sum of |d loss / d student logits|.
STEPS = torch.arange(96, dtype=torch.float64) + 1
NV_STUDENT = (3 * torch.sin(0.7 * STEPS)).float().view(2, 3, 16)
NV_TEACHER = (4 * torch.cos(0.31 * STEPS)).float().view(2, 3, 16)
NV_LABELS = torch.tensor([[3, -100, 7], [0, 15, 9]])  # not shifted
ALL_LABELLED = NV_LABELS.clamp(min=0)


def top_4(convention, dtype=torch.float32):
    log_probs, ids = NV_TEACHER.log_softmax(-1).topk(4)
    return TopKTargets(ids, log_probs.to(dtype), convention=convention)


def value_and_gradient(teacher=NV_TEACHER, labels=NV_LABELS, num_tokens=5, **settings):
    student = NV_STUDENT.clone().requires_grad_()
    loss = loss_of_logits(student, teacher, labels, num_tokens, **settings).total
    return loss.item(), torch.autograd.grad(loss, student)[0].abs().sum().item()


REVERSE, MIXED = divergence("reverse_kl"), divergence("symmetric_kl", beta=0.5)
UNSCALED = {"temperature": 2.0, "scale_by_temperature_squared": False}


@pytest.mark.parametrize(
    ("settings", "value", "gradient"),
    [
        # Automodel KDLoss, mcore LogitsKLLoss, core LogitsDistillationLoss("none"): the mean over labelled tokens
        ({}, 2.720567226, 1.440744638),
        ({"temperature": 2.0}, 4.243047237, 2.141772032),  # Automodel, Model Optimizer's core
        (UNSCALED, 1.060761809, 0.535443008),  # mcore
        ({"divergence": REVERSE}, 3.122637510, 2.394009829),  # mcore LogitsKLLoss(reverse=True)
        # LogitsDistillationLoss knows no labels. "mean" divides by all elements, "batchmean" by the sequences
        ({"labels": ALL_LABELLED, "num_tokens": 2 * 3 * 16}, 0.152326494, 0.085375652),
        ({"labels": ALL_LABELLED, "num_tokens": 2}, 7.311671734, 4.098031521),
        # MFTLoss(threshold=0.2), which knows no ignored labels
        ({"labels": ALL_LABELLED, "num_tokens": 6, "label_margin": 0.2}, 2.687431574, 1.479777098),
        # mcore TopKLogitsKLLoss, Aligner forward, NeMo-RL forward
        ({"teacher": top_4("renormalised")}, 0.689084411, 0.880528510),
        ({"teacher": top_4("renormalised"), **UNSCALED}, 0.202943116, 0.251096457),  # mcore
        ({"teacher": top_4("renormalised"), "divergence": REVERSE}, 0.581604660, 0.752544999),  # Aligner, NeMo-RL
        ({"teacher": top_4("renormalised"), "ce_weight": 0.4}, 2.308665752, 1.618564844),  # Aligner fwd + 0.4 SFT
        ({"teacher": top_4("renormalised"), "divergence": MIXED}, 0.635344625, 0.815331638),  # NeMo-RL mixed
        ({"teacher": top_4("partial")}, 2.646480083, 1.360490203),  # Megatron cached, no ghost token
        ({"teacher": top_4("bucket")}, 2.437126637, 1.333100200),  # Megatron cached, ghost token
        ({"teacher": top_4("bucket", torch.float16)}, 2.437163830, 1.333119750),  # the same, as cached
        ({"teacher": top_4("student_full")}, 3.234698534, 1.577),  # NeMo-RL forward, zero_outside_topk
    ],
)
def test_values_and_gradients_of_nvidias_tools(settings, value, gradient):
    """Not here, since they compare hidden states: mcore's MSELoss and HiddenStateCosineLoss (11.862234, 0.967632)."""
    ours, our_gradient = value_and_gradient(**settings)
    assert ours == pytest.approx(value, rel=1e-6)
    assert our_gradient == pytest.approx(gradient, rel=1e-6 if gradient != 1.577 else 5e-4)  # known to 3 digits only


def test_megatrons_balancer():
    """LM + 2 (KL + cosine), each term rescaled to LM: 3 LM, whatever they are. The gradient, 5.061, has cosine's."""
    loss = loss_of_logits(NV_STUDENT, NV_TEACHER, NV_LABELS, 5, ce_weight=1.0, kd_weight=2.0, balance=True)
    assert loss.ce.item() == pytest.approx(4.048953, rel=1e-6)
    assert loss.total.item() == pytest.approx(12.146859169, rel=1e-6)
    assert loss.kd.item() == pytest.approx(2.720567226, rel=1e-6)  # that of the total says nothing about the teacher


@pytest.mark.parametrize("function", [REVERSE, MIXED])
def test_reverse_kl_to_a_top_k_without_a_rest_is_refused(function):
    """NeMo-RL's zero_outside_topk takes log 0 = -100 there (75.41 and 39.32 here): a number of its own making."""
    with pytest.raises(ValueError, match="student_full: defined for forward_kl only"):
        value_and_gradient(top_4("student_full"), divergence=function)


def aligner(kd_loss="fwd_kl", kd_loss_weight=1.0, sft_loss_weight=0.0, logits_scale=1.0, target_logits_scale=1.0):
    """Its settings, as docs/coming_from.md translates them."""
    kd = KDLossConfig(
        name={"fwd_kl": "forward_kl", "bwd_kl": "reverse_kl"}[kd_loss],
        weight=2 * kd_loss_weight,
        temperature=1 / logits_scale,
        teacher_temperature=1 / target_logits_scale,
        scale_by_temperature_squared=False,
        top_k_convention="renormalised",
    )
    return {"kd_ratio": 0.5, "kd_loss": kd, "ce_loss": CELossConfig(weight=2 * sft_loss_weight)}


def by_definition(logits_scale, target_logits_scale):
    """`_TopKLogitsCrossEntropy`: a softmax of the k logits on each side, times its scale; the mean over the mask."""
    top, ids = NV_TEACHER.double().topk(4)
    log_p = (target_logits_scale * top).log_softmax(-1)
    log_q = (logits_scale * NV_STUDENT.double().gather(-1, ids)).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)[NV_LABELS >= 0].mean().item()


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, 0.689084411),
        ({"kd_loss": "bwd_kl"}, 0.581604660),
        ({"sft_loss_weight": 0.4}, 2.308665752),
        ({"kd_loss_weight": 3.0}, 3 * 0.689084411),
        ({"logits_scale": 0.5, "target_logits_scale": 0.5}, 0.202943116),
        ({"logits_scale": 0.5, "target_logits_scale": 0.8}, by_definition(0.5, 0.8)),
        ({"logits_scale": 1.0, "target_logits_scale": 2.0}, by_definition(1.0, 2.0)),
    ],
)
def test_nemo_aligners_settings(settings, value):
    """Through the recipe's own objective, with a teacher that is compared as its settings say."""
    recipe = load_module(catalog.find_recipe("knowledge_distillation"))
    cfg = recipe.Config(**aligner(**settings))
    batch = data.Batch(NV_LABELS.clamp(min=0), NV_LABELS, torch.arange(3).expand(2, 3))
    targets = top_4(cfg.kd_loss.top_k_convention)
    found = recipe.objective(cfg, NV_STUDENT, identity(NV_STUDENT), targets, batch, 5, 1.0)
    assert found.total.item() == pytest.approx(value, rel=1e-6)
