"""The page: complete without a network or a script, well-formed, and nothing in a run gets at it."""

import base64
import hashlib
import re
from pathlib import Path

from kdtune.evaluation import comparing

from .folders import Page, render, write_evaluation, write_run, write_sweep

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m\u202e\"'&<b>"


def check(text: str) -> Page:
    """Well-formed, of itself alone, and with links that lead somewhere."""
    page = Page(text)
    assert not set(page.tags) & {"img", "link", "iframe", "object", "base", "form", "embed", "video", "image", "use"}
    assert not {name for name in page.attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")}
    for forbidden in ("http:", "https:", "url(", "@import", "//"):
        assert forbidden not in re.sub(r"^ *// .*$", "", text, flags=re.MULTILINE), forbidden
    assert [char for char in text if not char.isprintable() and char != "\n"] == []
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text, "no other script would run"
    assert "default-src 'none'" in text
    for wanted in ('name="viewport"', "prefers-color-scheme: dark", "@media print"):
        assert wanted in text
    return page


def test_a_page_of_one_run(tmp_path: Path) -> None:
    page = check(render(write_run(tmp_path / "run")))
    assert "Validation cross-entropy went from 3.000 to 2.000 nats per token over 8 steps." in page.text
    assert "The teacher's own is 1.750: 80% of the distance to it is gone." in page.text
    assert page.tags.count("figure") == 3 + 2 + 4 + 1  # validation, training, machine, others
    assert page.tags.count("desc") == page.tags.count("figure")
    assert "Cross-entropy, nats per token, over the steps. run: from 3.000 at step 0 to 2.000 at step 8, " in page.text


def test_a_page_of_several_runs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, better=better, kd_ratio=better) for name, better in (("a", 0), ("b", 0.25))]
    text = render(*folders)
    page = check(text)
    assert "Lowest validation cross-entropy: b, 1.750 nats per token: 0.250 below a (next)." in page.text
    assert "Highest top-1 agreement with the teacher: b, 75.0%: 25.0 points above a (next)." in page.text
    assert "Each of these is a single run." in page.text
    assert "kd_ratio differs, so that heights cannot be compared" in page.text
    assert '<tr><th scope="row">a</th><td>0</td></tr>' in text


def test_validation_on_different_rows_is_not_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, dataset_val={"split": name}) for name in ("a", "b")]
    page = check(render(*folders))
    assert "The runs were validated on different rows (dataset_val.split differ)" in page.text
    assert "Lowest validation" not in page.text


def test_distances_to_different_teachers_are_not_compared(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / name, lines=[{"step": 1, "val_ce_loss": ce, "val_kd_loss": 1.0, "val_teacher_ce_loss": ce}]
        )
        for name, ce in (("a", 1.5), ("b", 1.25))
    ]
    page = check(render(*folders))
    assert "The teachers differ: their own validation cross-entropy is from 1.250 to 1.500." in page.text
    assert "Lowest validation cross-entropy: b" in page.text
    assert "Lowest KL" not in page.text


def test_distances_that_a_cache_tells_are_not_compared_with_others(tmp_path: Path) -> None:
    """Of draws they are estimates, which can be below 0, of a top k a part, and beside a live teacher the whole."""
    lines = [{"step": 8, "val_ce_loss": 2.5, "val_kd_loss": kd, "val_agreement": kd + 0.5} for kd in (0.1, -0.002)]
    live = write_run(tmp_path / "live", lines=lines[:1], teacher={"cache_dir": None})
    cached = [
        write_run(tmp_path / f"cached{i}", lines=lines[1:], kd_ratio=i, teacher={"cache_dir": "draws"}) for i in (0, 1)
    ]
    page = check(text := render(live, *cached))
    assert "The KL to the teacher was measured in different ways (teacher.cache_dir differs)" in page.text
    assert "Lowest KL" not in page.text
    assert "Highest top-1 agreement with the teacher: live" in page.text
    assert "<b>-0.002</b>" not in text
    page = check(render(*cached))
    assert "Lowest KL to the teacher: cached0, -0.002" in page.text
    assert "of draws an unbiased estimate, which can be below 0" in page.text
    assert "unbiased" not in check(render(live)).text


def test_a_page_of_a_sweep(tmp_path: Path) -> None:
    page = check(render(write_sweep(tmp_path / "sweep", {"plain": 0.0, "better": 0.1})))
    # The seeds add 0, 0.01 and 0.02 to both, and to `better` another 0, 0.001 and 0.002.
    assert (
        "kd_loss.name=better, 1.889 ± 0.006 nats per token: 0.101 [0.099, 0.103] below kd_loss.name=plain (next)."
        in page.text
    )
    assert "95% intervals of the difference between runs with the same seed" in page.text
    assert "the band from their lowest to their highest" in page.text


def test_differences_within_chance_are_called_so(tmp_path: Path) -> None:
    for seed, better in enumerate((0.1, -0.1, 0.05)):
        write_run(tmp_path / f"a{seed}", seed=seed, kd_ratio=0.0)
        write_run(tmp_path / f"b{seed}", seed=seed, better=better)
    page = check(render(*sorted(tmp_path.iterdir())))
    assert "0.017 [-0.242, 0.275], not to be told from chance with 3 seeds, below kd_ratio=0 (next)" in page.text


def test_a_page_of_an_evaluation(tmp_path: Path) -> None:
    text = render(write_evaluation(tmp_path / "one"))
    page = check(text)
    assert "On 40 examples of held-out text: cross-entropy 2.288 ± 0.031 nats/token, KL to the teacher 0.4" in page.text
    assert "On 40 examples of quiz: acc 35.0 ± 7.0%." in page.text
    assert "upon" in page.text
    assert " a <b>time" in page.text
    assert '<span class="token k5" title="“&lt;b&gt;”: teacher says “y”, student says “x”, KL 3.000' in text
    assert '<span class="token">↵\n</span>' in text
    assert "Differences" not in page.text


def test_a_page_of_several_evaluations(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / f"eval{i}", better=i / 10, name=f"runs/r{i}/model") for i in (0, 1)]
    run = write_run(tmp_path / "runs" / "r1")
    text = render(*folders, run)
    page = check(text)
    (difference,) = [one for one in comparing.compare(*folders).differences if one.metric == "ce"]
    assert difference.verdict == "better"
    interval = f"[{-difference.high:.4f}, {-difference.low:.4f}]"
    assert f"is that of eval1, 2.178 ± 0.032 nats/token, 0.1098 {interval} below eval0." in page.text
    assert "What another seed of training would change is not in them" in page.text
    names = re.findall(r'class="swatch (c\d)".*?</svg> (\w+)</th>', text)
    assert ("c0", "eval1") in names, "the colour of the run that it is of"
    assert ("c1", "eval0") in names
    assert page.tags.count("circle") == 3, "ce, perplexity and bits_per_byte: what differs in nothing has no interval"
    assert re.search(
        r"Add 7:\s*reference7 <b>eval0: Rouge-L 25.0%runs/r0/model 7eval1: Rouge-L 25.0%runs/r1/model 7", page.text
    )
    assert "8 of 12 prompts, with the reference and the response of the first seed" in page.text
    assert "Add 8:" not in page.text
    assert "On quiz, acc is the same in all: 35.0 ± 7.0%." in page.text


def test_evaluations_that_cannot_be_compared(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / f"eval{count}", count=count) for count in (30, 40)]
    text = render(*folders)
    page = check(text)
    assert "eval40 cannot be compared with eval30: " in page.text
    assert "Only results of the same examples can be compared" in page.text
    assert "Differences from" not in page.text
    assert "is that of" not in page.text, "numbers of other examples are not ranked"
    assert "is the same in all" not in page.text
    assert "<b>" not in text


def test_caveats_of_differences_are_told_once(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / f"eval{i}", better=i / 10) for i in range(3)]
    page = check(render(*folders))
    few = "intervals of fewer than 50 examples are too narrow (text: 40, quiz: 40)"
    assert page.text.count(few) == 1
    assert f"eval1, eval2 against eval0: {few}" in page.text


def test_a_seed_that_diverged_makes_its_mean_nan(tmp_path: Path) -> None:
    """As in the table of a sweep; such a group is ranked nowhere."""
    for ratio, ends in ((0.0, (2.5, 2.4)), (0.5, (1.5, None)), (1.0, (2.2, 2.1))):
        for seed, end in enumerate(ends):
            lines = [{"step": 0, "val_ce_loss": 3.0}, {"step": 8, "val_ce_loss": end}]
            write_run(tmp_path / f"{ratio}-{seed}", seed=seed, kd_ratio=ratio, lines=lines)
    text = render(*sorted(tmp_path.iterdir()))
    page = check(text)
    assert re.search(r"kd_ratio=0.5</th><td>2</td><td>8</td><td>nan</td>", text)
    assert "Lowest validation cross-entropy: kd_ratio=1, 2.150 ± 0.050" in page.text
    assert re.search("<b>2.150 ± 0.050</b>", text)
    page = check(render(tmp_path / "0.5-1"))
    assert "Validation cross-entropy went from 3.000 to nan nats per token over 8 steps." in page.text


def test_runs_without_a_seed(tmp_path: Path) -> None:
    page = check(render(*(write_run(tmp_path / name, seed=None, better=i / 10) for i, name in enumerate("ab"))))
    assert "Lowest validation cross-entropy: b, 1.900 nats per token: 0.100 below a (next)." in page.text


def test_what_has_not_come_as_far_is_told_and_not_averaged(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path / f"a{seed}", seed=seed, steps=8)
        write_run(tmp_path / f"b{seed}", seed=seed, kd_ratio=0.5, steps=16 if seed else 10, better=0.5)
    page = check(render(*sorted(tmp_path.iterdir())))
    assert "Not as far as others of their group, and left out of its means and curves: b0" in page.text
    assert "below kd_ratio=1 (next, 8 steps against 16)" in page.text
    assert "kd_ratio=0.5: from 2.500 at step 0 to 1.500 at step 16" in page.text


def test_settings_that_only_some_have(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "full", lora=None), write_run(tmp_path / "lora", lora={"rank": 4, "alpha": 8})]
    text = render(*runs)
    check(text)
    assert '<tr><th scope="row">full</th><td>null</td></tr>\n<tr><th scope="row">lora</th><td>given</td></tr>' in text
    assert "Settings that only some of them have (2)" in text
    assert '<tr><th scope="row">lora</th><td>8</td><td>4</td></tr>' in text


def test_hostile_names_and_settings(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    lines = [{"step": step, "loss": 1.0, HOSTILE: 2.0, "val_ce_loss": 1.0} for step in (0, 1)]
    folders = [
        write_run(tmp_path / f"{name}{i}", lines=lines, prompt=HOSTILE * (i + 1), **{HOSTILE: i}) for i in (0, 1)
    ]
    text = render(*folders)
    page = check(text)
    assert "onerror" not in page.attributes
    assert "<b>\\x1b" not in text
    assert "</script><img src=x onerror=alert(1)>\\x1b[31m\\u202e\"'&<b>" in page.text
    assert len(page.scripts) == 1


def test_long_runs_gaps_and_many_runs(tmp_path: Path) -> None:
    lines = [
        {"step": step, "loss": None if step % 97 == 0 else 2 + 1 / step, "grad_norm": 1e4 if step == 4321 else 0.5}
        for step in range(1, 6001)
    ]
    text = render(write_run(tmp_path / "long", lines=lines))
    page = check(text)
    assert len(text) < 400_000
    assert "Lines are means over 201 logged steps" in page.text
    assert "Not finite, so that the curves have gaps: long (loss at 61 steps)" in page.text
    assert "No run was validated" in page.text
    assert "log scale" in page.text
    many = [write_run(tmp_path / f"run{i}", kd_ratio=i / 60, steps=2 + i % 3, better=i / 100) for i in range(60)]
    text = render(*many)
    page = check(text)
    assert page.tags.count("li") > 60
    assert "In colour: the first, and the 3 that end lowest." in page.text
    colours = [re.findall(r'<li data-group="(\d+)"><svg class="swatch c', line) for line in text.splitlines()]
    assert sum(map(len, colours)) == 4
    assert len(text) < 3_000_000


def test_runs_of_one_step_and_of_values_that_never_change(tmp_path: Path) -> None:
    once = write_run(tmp_path / "once", lines=[{"step": 1, "loss": 0.0, "val_ce_loss": None}], finished=False)
    page = check(render(once))
    assert page.tags.count("figure") == 1
    still = write_run(tmp_path / "still", lines=[{"step": step, "loss": 3.0, "lr": 0.0} for step in (1, 2)])
    check(render(once, still))
