"""Defaults <- YAML <- key=value: what is accepted, and the words in which the rest is refused."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from kdtune import config
from kdtune.config import MISSING, setting


@dataclass
class Rows:
    source: str = MISSING  # file, folder or hub name
    format: Literal["instruct", "chat"] = "instruct"  # what a row holds
    column_map: dict[str, str] = setting({})  # our name: theirs
    max_rows: int | None = setting(None, ge=0)  # rows to read; null: all


@dataclass
class Optimizer:
    lr: float = setting(1e-4, gt=0)  # peak, after the warm-up
    # decay of both moments
    # (Adam's)
    betas: list[float] = setting([0.9, 0.95], ge=0, lt=1)


@dataclass
class Config:
    output_dir: str  # where everything goes
    batch_size: int = setting(4, gt=0)
    kd_ratio: float = setting(0.5, ge=0, le=1)
    shuffle: bool = True
    name: str | None = None
    rank: Literal[8, 16] = 8
    stop: list[str] | None = None
    dataset: Rows = setting(Rows)  # rows to train on
    dataset_val: Rows | None = None  # rows to validate on
    optimizer: Optimizer = setting(Optimizer)
    log_dir: str = "${output_dir}/log"


REQUIRED = ["output_dir=out", "dataset.source=rows.json"]


def load(*overrides: str, yaml: Path | None = None) -> Config:
    return config.load(Config, yaml, [*REQUIRED, *overrides])


def refusal(*overrides: str, yaml: Path | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load(*overrides, yaml=yaml)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_later_wins(write: Any) -> None:
    yaml = write("batch_size: 2\nkd_ratio: 1\ndataset:\n  source: from_yaml\n  format: chat\n")
    cfg = config.load(Config, yaml, ["output_dir=o", "batch_size=8"])
    assert (cfg.batch_size, cfg.kd_ratio, cfg.shuffle) == (8, 1.0, True)
    assert cfg.dataset == Rows("from_yaml", "chat")
    assert cfg.log_dir == "o/log"
    assert type(cfg.kd_ratio) is float


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=a=b", "a=b"),
        ("name=5", "5"),
        ("name=007", "007"),
        ("name=1e-3", "1e-3"),
        ("name=true", "true"),
        ("name=[1, 2]", "[1, 2]"),
        ("name=a b: c #d", "a b: c #d"),
        ("name='quoted: text'", "quoted: text"),
        ("name='", "'"),
        ("name='a' and 'b'", "'a' and 'b'"),
        ("name=", ""),
        ("name=null", None),
        ("name=None", None),
        ("name=~", None),
        ("name='null'", "null"),
        ("name=${batch_size}", "4"),
        ("batch_size=16", 16),
        ("kd_ratio=1e-3", 1e-3),
        ("kd_ratio=1", 1.0),
        ("shuffle=false", False),
        ("shuffle=no", False),
        ("rank=16", 16),
        ("stop=[a, 1]", ["a", "1"]),
        ("stop=[]", []),
        ("stop=null", None),
        ("dataset.max_rows=None", None),
        ("dataset.column_map={instruction: question}", {"instruction": "question"}),
        ("dataset.column_map.output=5", {"output": "5"}),
        ("dataset.column_map={a.b: c}", {"a.b": "c"}),
        ("optimizer.betas=[0, 1e-1]", [0.0, 0.1]),
        ("optimizer={lr: 2}", Optimizer(lr=2.0)),
        ("dataset_val={source: v}", Rows("v")),
        ("dataset_val=null", None),
        ("dataset_val=${dataset}", Rows("rows.json")),
    ],
)
def test_override(override: str, value: object) -> None:
    found: Any = load(override)
    for name in override.partition("=")[0].split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
        if isinstance(found, dict):
            break
    assert found == value
    assert type(found) is type(value)


def test_home(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind `key=` a shell leaves `~` as it is."""

    @dataclass
    class Places:
        folder: str = setting(MISSING, path=True)
        name: str = "x"

    monkeypatch.setenv("HOME", "/home/kd")
    with pytest.raises(ValueError, match="folder is a place on the disk and cannot be empty"):
        config.load(Places, None, ["folder="])  # as from folder=$UNSET in a shell
    assert config.load(Places, None, ["folder=~/a~b", "name=~/a"]) == Places("/home/kd/a~b", "~/a")
    assert config.load(Places, write("folder: ~/runs\nname: ~/${folder}"), []) == Places(
        "/home/kd/runs", "~//home/kd/runs"
    )


def test_negative_number() -> None:
    @dataclass
    class Signed:
        offset: int = 0

    assert config.load(Signed, None, ["offset=-3"]).offset == -3


def test_a_setting_inside_creates_an_optional_section(write: Any) -> None:
    assert load("dataset_val.source=v", "dataset_val.max_rows=2").dataset_val == Rows("v", max_rows=2)
    assert load(yaml=write("dataset_val: {source: v}")).dataset_val == Rows("v")
    assert load("dataset_val=null", yaml=write("dataset_val: {source: v}")).dataset_val is None


def test_maps_and_sections_are_merged_and_lists_replaced(write: Any) -> None:
    yaml = write("dataset:\n  column_map: {a: b}\nstop: [x, y]\n")
    cfg = load("dataset.column_map.c=d", "stop=[z]", yaml=yaml)
    assert cfg.dataset.column_map == {"a": "b", "c": "d"}
    assert cfg.stop == ["z"]


def test_defaults_are_not_shared() -> None:
    load().dataset.column_map["a"] = "b"
    assert load().dataset.column_map == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batchsize=1", "unknown setting batchsize. Did you mean batch_size?"),
        ("optimizer.lrr=1", "unknown setting optimizer.lrr. Did you mean optimizer.lr?"),
        ("optimiser.lr=1", "unknown setting optimiser. Did you mean optimizer?"),
        ("lr=1", "Did you mean optimizer.lr?"),
        ("source=x", "Did you mean dataset.source or dataset_val.source?"),
        ("zzz=1", "unknown setting zzz."),
        ("optimizer._component_=torch.optim.AdamW", "kdtune configs name no classes"),
        ("batch_size=x", 'batch_size wants int, got "x".'),
        ("batch_size=1.5", "batch_size wants int, got 1.5."),
        ("batch_size=true", "batch_size wants int, got true."),
        ("batch_size=", 'batch_size wants int, got "".'),
        ("batch_size=null", "batch_size wants int, got null."),
        ("batch_size=[1", 'batch_size wants int, got "[1".'),
        ("batch_size=${kd_ratio}", 'batch_size wants int, got "${kd_ratio}"'),
        ("batch_size.x=1", "batch_size is int and has no setting x inside."),
        ("shuffle=2", "shuffle wants bool, got 2."),
        ("output_dir=null", "output_dir wants str, got null."),
        ("rank=9", "rank wants one of 8, 16, got 9."),
        ("dataset.format=chatt", 'dataset.format wants one of instruct, chat, got "chatt". Did you mean chat?'),
        ("dataset.column_map={a: {b: c}}", "dataset.column_map wants dict[str, str]"),
        ("dataset.column_map=[1]", "dataset.column_map wants dict[str, str], got [1]."),
        ("dataset.column_map={output:answer}", "Write a space behind each colon: {a: b}."),
        ("optimizer.betas=0.9", "Write optimizer.betas=[0.9] for a list."),
        ("optimizer.betas=[{0.9", "Close each bracket, and put quotes around each text that has brackets or a colon."),
        ("stop=[Question: Tom]", "Put quotes around each text that has a colon in it."),
        ("stop=[[a]]", "stop wants list[str] or null"),
        ("optimizer=adamw", "Set the values inside: optimizer.lr, optimizer.betas"),
        ("optimizer=null", "optimizer wants section, got null."),
        ("batch_size=0", "batch_size must be > 0, got 0."),
        ("kd_ratio=1.5", "kd_ratio must be >= 0 and <= 1, got 1.5."),
        ("kd_ratio=nan", "kd_ratio must be a finite number, got NaN."),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas must be >= 0 and < 1, got 1.0."),
        ("name=${output_dirr}", 'name="${output_dirr}" leads nowhere. Did you mean output_dir?'),
        ("name=${dataset_val.source}", "It lies in a section that is null."),
        ("name=${name}", "name wants str or null"),
        ("name=${", "name uses ${"),
        ("name=${oc.env:HOME}", "name uses ${oc.env:HOME}"),
        ("name=${asset:../config.py}", "kdtune ships no ../config.py"),
        ("batch_size", "Did you mean batch_size=...?"),
        ("--batch_size=2", "Did you mean batch_size=2?"),
        ("-batch_size", "settings are given as key=value"),
        ("=2", "settings are given as key=value"),
        ("~name", "name=null switches off what can be."),
    ],
)
def test_refusal(override: str, words: str) -> None:
    message = refusal(override)
    assert words in message
    assert "\n" not in message


def test_option_form_names_the_right_form() -> None:
    assert "Did you mean batch_size=4?" in refusal("--batch_size", "4")


@dataclass
class Precision:
    dtype: Literal["bf16", "fp32"] = "bf16"


@pytest.mark.parametrize(("long", "short"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_long_name_of_a_dtype_names_the_short(long: str, short: str) -> None:
    with pytest.raises(ValueError, match=f"Did you mean {short}"):
        config.load(Precision, None, [f"dtype={long}"])


def test_everything_wrong_is_said_at_once(write: Any) -> None:
    yaml = write("batchsize: 1\ndataset:\n  sorce: x\nkd_ratio: banana\n")
    lines = refusal(yaml=yaml).splitlines()
    assert [re.split(r" \(| wants", line)[0] for line in lines] == [
        "unknown setting batchsize",
        "unknown setting dataset.sorce",
        "kd_ratio",
    ]
    assert all(str(yaml) in line for line in lines)


def test_missing_settings_are_listed_at_once() -> None:
    with pytest.raises(ValueError, match=r"no value for output_dir, dataset\.source, dataset_val\.source\."):
        config.load(Config, None, ["dataset_val.max_rows=1"])


@pytest.mark.parametrize(
    "value",
    [
        "${${output_dir}:HOME}",
        "${oc.${log_dir}:HOME}",
        "${ oc.env : HOME }",
        "\\\\${oc.env:HOME}",  # an escaped backslash, and an interpolation that is not escaped
        "${asset:${oc.env:HOME}}",
        "${oc.create:{a: 1}}",
        "[${oc.env:HOME}]",
    ],
)
def test_no_resolver_gets_in_by_another_spelling(value: str) -> None:
    with pytest.raises(ValueError, match="a config knows"):
        config.load(Config, None, ["output_dir=oc.env", "log_dir=env", "dataset.source=x", f"name={value}"])


def test_interpolation_to_a_missing_setting_is_one_message() -> None:
    with pytest.raises(ValueError, match=r"^no value for output_dir\.[^\n]*$"):
        config.load(Config, None, ["dataset.source=x", "name=${output_dir}"])


def test_values_inside_a_copied_section_are_refused() -> None:
    assert "dataset_val is a copy of another section" in refusal("dataset_val=${dataset}", "dataset_val.source=x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2\n", "config.yaml, line 2, column 2: not YAML: "),
        ("a:\n\tb: 1\n", "config.yaml, line 2, column 1: not YAML: "),
        ("name: a\nname: b\n", "line 2, column 1: not YAML: found duplicate key name"),
        ("name: !!python/object:os.system x\n", "line 1, column 7: not YAML: could not determine a constructor"),
        ("name: ${\n", "config.yaml: not YAML"),
        ("name: &a [*a]\n", "line 1, column 7: not YAML: YAML recursive aliases are not supported."),
        (f"name: {'[' * 5000}{']' * 5000}\n", "config.yaml: not YAML: nested too deeply."),
        ("- 1\n- 2\n", "this is a list"),
        ("name: yes\n", "name wants str or null, got true, which YAML reads as true or false: quote it"),
        ("1: 2\n", "unknown setting 1 "),
        ("dataset.source: x\n", "Write source under dataset, indented."),
    ],
)
def test_bad_yaml(text: str, words: str, write: Any) -> None:
    assert words in refusal(yaml=write(text))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "name: None\n", "output_dir: 5\nname: null\n"])
def test_good_yaml(text: str, write: Any) -> None:
    assert load(yaml=write(text)).name is None


def test_yaml_number_is_text_for_a_text_setting(write: Any) -> None:
    assert load(yaml=write("name: 5\n")).name == "5"


def test_config_file_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.yaml"):
        load(yaml=tmp_path / "nope.yaml")


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x93")
    assert "not YAML" in refusal(yaml=path)


def test_asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "rows.jsonl").touch()
    monkeypatch.setattr(config.loading, "ASSETS", tmp_path)
    assert load("name=${asset:quickstart}").name == str(tmp_path / "quickstart")
    assert load("name=${asset:quickstart/rows.jsonl}").name == str(tmp_path / "quickstart" / "rows.jsonl")
    assert "did you mean quickstart/rows.jsonl?" in refusal("name=${asset:quickstart/row.jsonl}")


def test_to_yaml_is_read_back(write: Any) -> None:
    cfg = load("name='5'", "dataset_val.source=1e-3", "stop=['null', 'a: b', '']", "dataset.column_map={'on': 'no'}")
    cfg.dataset.format = "chat"
    text = config.to_yaml(cfg)
    assert "log_dir: out/log" in text
    assert config.load(Config, write(text), []) == cfg


@pytest.mark.parametrize(
    ("override", "name"), [(r"name=\${x:y} \${z}", "${x:y} ${z}"), (r"name=\\\${oc.env:HOME}", r"\${oc.env:HOME}")]
)
def test_escaped_interpolation_is_text(override: str, name: str, write: Any) -> None:
    cfg = load(override)
    assert cfg.name == name
    assert config.load(Config, write(config.to_yaml(cfg)), []) == cfg


def test_describe() -> None:
    found = {line.key: line for line in config.describe(Config)}
    assert list(found)[:3] == ["output_dir", "batch_size", "kd_ratio"]
    assert found["output_dir"] == config.Setting("output_dir", "str", MISSING, "where everything goes", "", ())
    assert found["output_dir"].required
    assert (found["kd_ratio"].range, found["kd_ratio"].default, found["kd_ratio"].required) == (
        ">= 0, <= 1",
        0.5,
        False,
    )
    assert found["dataset"].is_section
    assert found["dataset"].comment == "rows to train on"
    assert found["dataset_val"].type == "section or null"
    assert found["dataset_val.format"].choices == ("instruct", "chat")
    assert found["dataset_val.max_rows"].type == "int or null"
    assert found["dataset_val.max_rows"].comment == "rows to read; null: all"
    assert found["optimizer.lr"].comment == "peak, after the warm-up"
    assert found["optimizer.betas"].comment == "decay of both moments (Adam's)"
    assert found["optimizer.betas"].default == [0.9, 0.95]


def test_no_torch() -> None:
    code = "import sys, kdtune.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@dataclass
class Source:
    path: str = setting(MISSING, path=True)  # where it is
    weight: float | None = setting(None, gt=0)  # how much of it


@dataclass
class Blend:
    sources: dict[str, Source] = setting({})  # several, by names of one's own


def test_sections_by_name(tmp_path: Path) -> None:
    file = tmp_path / "blend.yaml"
    file.write_text("sources:\n  math: {path: a.jsonl, weight: 0.5}\n  code:\n    path: b.jsonl\n")
    overrides = ["sources.code.weight=2", "sources.more.path=c.jsonl", "sources={math: {weight: 3}}"]
    cfg = config.load(Blend, file, overrides)
    assert cfg.sources == {
        "math": Source("a.jsonl", 3.0),
        "code": Source("b.jsonl", 2.0),
        "more": Source("c.jsonl", None),
    }
    file.write_text(config.to_yaml(cfg))
    assert config.load(Blend, file, []) == cfg
    keys = [setting.key for setting in config.describe(Blend)]
    assert keys == ["sources", "sources.<name>.path", "sources.<name>.weight"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources.math.wieght=2", "unknown setting sources.math.wieght. Did you mean sources.<name>.weight?"),
        ("sources.math.weight=-1", "sources.math.weight must be > 0, got -1.0"),
        ("sources.math.weight=2", "no value for sources.math.path"),
        ("sources.math=3", 'sources wants sections by name, got {"math": "3"}. Write sources.<name>.path=...'),
        ("sources=[math]", 'sources wants sections by name, got ["math"]'),
        ("sources=math", 'sources wants sections by name, got "math"'),
    ],
)
def test_wrong_sections_by_name(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config.load(Blend, None, [override])
