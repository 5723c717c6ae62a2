"""What the command line of a recipe means, in every spelling that it accepts."""

import sys
from dataclasses import dataclass, field

import pytest
import torch
from trl import GRPOConfig

from lenvm_rl.programs import ProgramParser, sentence_of
from lenvm_rl.programs.command_line import help_groups
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMPPOConfig
from recipes import import_rollouts, pretrain_lenvm, sample_rollouts
from recipes.arguments import read_arguments


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def read(monkeypatch, *line, config_class=LenVMGRPOConfig, sandbox_config="sandbox_grpo.yaml"):
    monkeypatch.setattr(sys, "argv", ["recipes/grpo_shaped.py", *map(str, line)])
    return read_arguments(config_class, sandbox_config, description="")


def write(path, text):
    path.write_text(text)
    return path


DATA = ("--dataset_name", "data.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        ("--model_name_or_path", "mine", *DATA),
        ("--model-name-or-path", "mine", *DATA),
        ("--model_name_or_path=mine", *DATA),
        ("--model-name-or-path=mine", "--dataset-name=data.jsonl"),
        ("--model_name", "mine", *DATA),
        ("--model-name", "mine", *DATA),
        ("--model-n=mine", "--dataset-na", "data.jsonl"),
        (*DATA, "--model_name_or_path", "mine"),
    ],
)
@pytest.mark.parametrize(
    "config_class, sandbox_config", [(LenVMGRPOConfig, "sandbox_grpo.yaml"), (LenVMPPOConfig, "sandbox_ppo.yaml")]
)
def test_the_sandboxs_settings_stay_away_from_a_model_of_ones_own(line, config_class, sandbox_config, monkeypatch):
    line = (*line, "--output_dir", "out", "--reward_funcs", "my.reward")
    args, config, model = read(monkeypatch, *line, config_class=config_class, sandbox_config=sandbox_config)
    assert (model.model_name_or_path, args.dataset_name) == ("mine", "data.jsonl")
    assert (config.length_coef, config.learning_rate, config.shuffle_dataset) == (0.0, 1e-6, True)
    assert config.use_cpu and not config.bf16


def test_without_one_they_are_the_sandboxs(monkeypatch):
    args, config, model = read(monkeypatch)
    assert model.model_name_or_path is None and args.pretrain_learning_rate == 1e-3
    assert (config.length_coef, config.learning_rate, config.shuffle_dataset) == (1.5, 4e-4, False)
    # What is given counts, in any spelling.
    _, config, _ = read(monkeypatch, "--length-coef=2", "--learning-r", "1e-5", "--use_cpu", "false")
    assert (config.length_coef, config.learning_rate, config.use_cpu) == (2.0, 1e-5, False)


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
@pytest.mark.parametrize("name", ["model_name_or_path", "model-name-or-path"])
def test_a_model_in_yaml_counts(spelling, name, tmp_path, monkeypatch):
    data = "dataset_name: data.jsonl\nreward_funcs: [my.reward]\n"
    path = write(tmp_path / "c.yaml", f"{name}: mine\n{data}output_dir: out\nbf16: true\n")
    _, config, model = read(monkeypatch, *spelling.format(path).split())
    assert model.model_name_or_path == "mine" and (config.length_coef, config.learning_rate) == (0.0, 1e-6)
    assert config.bf16 and config.use_cpu
    _, config, _ = read(monkeypatch, "--config", path, "--bf16=false", "--use-cpu", "true")
    assert config.use_cpu and not config.bf16


def test_half_a_setup_is_no_sandbox(monkeypatch):
    with pytest.raises(ValueError, match="--model_name_or_path"):
        read(monkeypatch, "--dataset-name", "data.jsonl", "--output_dir", "out")
    with pytest.raises(ValueError, match="--dataset_name"):
        read(monkeypatch, "--model-name-or-path", "mine", "--output_dir", "out")


@dataclass
class Options:
    size: int = 1
    rate: float = 0.5
    columns: list[str] = field(default_factory=list)
    kind: str = field(default="a", metadata={"choices": ["a", "b"], "help": "Kind."})
    rates: list[float] = field(default_factory=list)
    sizes: list[int] | None = None


def parse(*line):
    return ProgramParser(Options).parse_args_and_config([str(each) for each in line])[0]


def test_yaml_says_what_the_command_line_says(tmp_path):
    path = write(tmp_path / "c.yaml", "size: 3\nrate: 1e-3\ncolumns: answer\nkind: b\n")
    assert parse("--config", path) == Options(3, 1e-3, ["answer"], "b")
    assert parse("--config", path, "--columns", "x", "y", "--size", 2) == Options(2, 1e-3, ["x", "y"], "b")
    assert parse("--config", write(path, "columns: [a, b]\nsize: 4.0\n")) == Options(4, columns=["a", "b"])
    # YAML takes 1e-3 for text.
    lists = "rates: [1e-3, 0.5]\nsizes: [3, 4]\n"
    assert parse("--config", write(path, lists)) == Options(rates=[1e-3, 0.5], sizes=[3, 4])
    assert parse("--config", write(path, "rates: 1e-3\n")) == Options(rates=[1e-3])


@pytest.mark.parametrize(
    "text, problem",
    [
        ("size: [1]\n", "size"),
        ("size: 1.5\n", "size"),
        ("rates: [1e-3, a]\n", "rates"),
        ("rate: {a: 1}\n", "rate"),
        ("kind: c\n", "kind"),
        ("sise: 1\n", "--size"),
        ("a: b: c\n", "no YAML"),
        ("\t- a\n", "no YAML"),
        ("", "name: value"),
        ("- size\n", "name: value"),
        ("1: 2\n", "name: value"),
    ],
)
def test_a_yaml_file_that_cannot_be_meant_is_refused(text, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        parse("--config", write(tmp_path / "c.yaml", text))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nope.yaml"):
        parse("--config", tmp_path / "nope.yaml")
    with pytest.raises(ValueError, match="--seize.*--size"):
        parse("--seize", "1")
    with pytest.raises(ValueError, match="a.yaml, b.yaml"):
        parse("--config", "a.yaml", "--config=b.yaml")


@pytest.mark.parametrize("program", [sample_rollouts, pretrain_lenvm, import_rollouts])
def test_every_recipe_reads_its_command_line_so(program):
    assert isinstance(program.make_parser(), ProgramParser)


def test_what_an_option_may_not_be_is_told_in_a_sentence(monkeypatch):
    with pytest.raises(ValueError) as caught:
        read(monkeypatch, "--num_generations", 3, "--generation_batch_size", 8)
    assert "generation_batch_size" in sentence_of(caught.value)


@dataclass
class Base(GRPOConfig):
    """Options of the base."""

    own: int = field(default=1, metadata={"help": "First, e.g. this. Then much more."})


@dataclass
class Derived(Base):
    """More. Not the heading: this class names one."""

    _argument_group_name = "Derived"
    later: str | None = field(default=None, metadata={"help": "Which: it depends. More of it. Default: what is there."})
    most: float = field(default=2.0, metadata={"help": "Three times another's default."})
    beta: float = field(default=0.5, metadata={"help": "Ours now."})


def test_the_help_has_ours_first_by_the_class_that_tells_them():
    groups = {group.title: group.names for group in help_groups([Derived])}
    assert list(groups)[:2] == ["Options of the base", "Derived"]
    assert groups["Options of the base"] == ("own",) and set(groups["Derived"]) == {"later", "most", "beta"}
    assert {"learning_rate", "num_generations"} <= set(list(groups.values())[2])
    assert not {"own", "later", "most", "beta"} & set(list(groups.values())[2])


def test_the_help_says_a_sentence_and_the_default_and_the_whole_help_all():
    parser = ProgramParser(Derived)
    brief, whole = parser.format_help(), parser.format_help(whole=True)
    assert "--own INT" in brief and "First, e.g. this. (default: 1)" in brief and "Then" not in brief
    assert "Then much more." in whole and "--adam_epsilon FLOAT" in whole and "--adam_epsilon" not in brief
    for text in (" ".join(brief.split()), " ".join(whole.split())):
        # What is no default of its own does not stand for one, and its own is told.
        assert "Three times another's default. (default: 2.0)" in text
        assert "Default: what is there." in text
    assert "More of it" not in brief
    # Where nothing is left over, nothing is left out.
    assert (
        "Kind. (default: a)" in ProgramParser(Options).format_help() and "a|b" in ProgramParser(Options).format_help()
    )
