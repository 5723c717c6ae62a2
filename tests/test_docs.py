"""The pages hold what the repository holds: every test, name, link, paper, setting and message in them is there."""

import ast
import dataclasses
import inspect
import re

import pytest
from places import ROOT
from trl import GRPOTrainer

from lenvm_rl.decoding import LengthGuidance
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.trainers import LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.checks import _OF_CONFIGS, _OF_TRAINERS
from recipes.arguments import ModelConfig, StageArguments
from recipes.sample_rollouts import SampleArguments, SamplingSettings

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PACKAGES = ("lenvm_rl", "reward", "eval", "recipes")
TEST = re.compile(r"\btests/[\w/]+\.py(?:::\w+)*")
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]*)\)")
ARXIV = re.compile(r"arXiv[ :]*(\d{4}\.\d{5})")


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(body):
    """Names that stand in the body of a module or class, with the node that brings each of them in."""
    found = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Assign):
            found.update((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def has_name(body, names):
    """Whether a chain of names leads into a body: a class, one of its own or inherited members."""
    found = definitions(body)
    if not names or names[0] not in found:
        return not names
    node, rest = found[names[0]], names[1:]
    if not rest:
        return True
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in PACKAGES:
        return has_dotted(".".join([node.module, *names]))
    if not isinstance(node, ast.ClassDef):
        return False
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return has_name(node.body, rest) or any(has_name(body, [base, *rest]) for base in bases if base in found)


def has_test(reference):
    """Whether `tests/file.py::Class::test` is there; a file by itself will do."""
    name, *names = reference.split("::")
    return (ROOT / name).is_file() and has_name(parsed(ROOT / name).body, names)


def has_dotted(reference):
    """Whether a dotted name is a module, something defined or imported in one, or a public name of `lenvm_rl`."""
    import lenvm_rl

    top, *names = reference.split(".")
    if top == "lenvm_rl" and names[0] in lenvm_rl._MODULE_OF_NAME:
        names = [*lenvm_rl._MODULE_OF_NAME[names[0]].split("."), *names]
    folder = ROOT / top
    while names and (folder / names[0]).is_dir():
        folder, names = folder / names[0], names[1:]
    if names and (folder / f"{names[0]}.py").is_file():
        return has_name(parsed(folder / f"{names[0]}.py").body, names[1:])
    package = folder / "__init__.py"
    return has_name(parsed(package).body if package.is_file() else [], names)


def mentioned(pattern, page):
    return sorted(set(pattern.findall(page.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    ("reference", "there"),
    [
        ("tests/test_docs.py", True),
        ("tests/test_docs.py::has_test", True),
        ("tests/decoding/test_tilt.py::TestTilt::setup_method", True),
        ("tests/decoding/test_tilt.py::TestTilt::test_nonsense", False),
        ("tests/test_docs.py::test_nonsense", False),
        ("tests/test_nonsense.py", False),
    ],
)
def test_a_test_is_found_only_where_it_is(reference, there):
    assert TEST.fullmatch(reference) and has_test(reference) == there


@pytest.mark.parametrize(
    ("reference", "there"),
    [
        ("lenvm_rl.returns", True),
        ("lenvm_rl.returns.fit_gamma", True),
        ("lenvm_rl.gae", True),
        ("lenvm_rl.trainers.LenVMPPOTrainer", True),
        ("lenvm_rl.LenVMPPOConfig.length_coef", True),
        ("lenvm_rl.LenVMPPOConfig.nonsense", False),
        ("lenvm_rl.trainers.config.LenVMPPOConfig.length_coef", True),
        ("lenvm_rl.trainers.streams.Completions.actions", True),
        ("eval.tradeoff", True),
        ("lenvm_rl.nonsense", False),
        ("lenvm_rl.returns.nonsense", False),
        ("lenvm_rl.returns.fit_gamma.nonsense", False),
        ("lenvm_rl.trainers.config.LenVMPPOConfig.nonsense", False),
        ("eval.nonsense", False),
    ],
)
def test_a_name_is_found_only_where_it_is(reference, there):
    assert DOTTED.fullmatch(reference) and has_dotted(reference) == there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_and_name_that_a_page_mentions_is_there(page):
    assert [reference for reference in mentioned(TEST, page) if not has_test(reference)] == []
    assert [reference for reference in mentioned(DOTTED, page) if not has_dotted(reference)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page):
    broken = []
    for link in mentioned(LINK, page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            broken.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            # As GitHub makes them: lower case, hyphens for spaces, no punctuation.
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            if anchor not in anchors:
                broken.append(link)
    assert broken == []


def test_every_paper_that_the_code_cites_is_on_the_page_of_papers():
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    cited = {}
    for folder in PACKAGES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for number in ARXIV.findall(path.read_text(encoding="utf-8")):
                cited.setdefault(number, path.relative_to(ROOT))
    assert len(cited) > 5
    assert {number: place for number, place in cited.items() if f"arxiv.org/abs/{number}" not in page} == {}


def test_the_mathematics_names_what_holds_it():
    """So that an empty page, or a pattern that finds nothing, does not pass for a correct one."""
    page = ROOT / "docs" / "mathematics.md"
    assert len(mentioned(TEST, page)) > 40 and len(mentioned(DOTTED, page)) > 30


# What a person can set: fields of these, and arguments of the trainer.
CONFIGS = (
    LenVMPPOConfig, StageArguments, ModelConfig, LengthGuidance, LengthValueTrainingArguments, SampleArguments,
    SamplingSettings,
)  # fmt: skip
GROUPS = "length|lenvm|advantage|critic|steering|refresh|guidance|completions|kl_reward|clip_ratio|policy"
METRIC = re.compile(rf"`((?:{GROUPS})/\w+|eval_[a-rt-z]\w+)`")


def page_text(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def marked(page, mark):
    """The points of a page that begin with a bold word, each in one line."""
    points = re.findall(rf"^- \*\*{mark}\*\*: (.+?)(?=^- |^#|\Z)", page, re.MULTILINE | re.DOTALL)
    return [" ".join(point.split()) for point in points]


def named_settings(text):
    """Names in code spans, with a value (`name=value`) or without; commands, classes and values are passed over."""
    return re.findall(r"`([a-z]\w*)(?:=[^`]*)?`", text)


def settings():
    fields = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    trainers = (LenVMPPOTrainer, GRPOTrainer)
    return fields.union(*(inspect.signature(trainer.__init__).parameters for trainer in trainers))


def messages():
    """Texts in the code, with … for what is filled in."""
    for path in [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[\d.]*[sdgf]", "…", node.value)


def test_every_setting_that_troubleshooting_names_is_one():
    named = [name for point in marked(page_text("troubleshooting.md"), "Set") for name in named_settings(point)]
    assert len(named) > 60 and [name for name in named if name not in settings()] == []
    assert named_settings("`length_coef=1`, `top_k`, `make test`, `lenvm_rl.gae`") == ["length_coef", "top_k"]


def test_every_message_that_troubleshooting_quotes_is_raised_or_logged():
    quoted = [
        text for point in marked(page_text("troubleshooting.md"), "Says") for text in re.findall(r'"(.+?)"', point)
    ]
    code = [text.replace("'…'", "…") for text in messages()]
    lost = [text for text in quoted if not any(text.replace("'…'", "…").rstrip("…") in each for each in code)]
    assert len(quoted) > 15 and lost == []


def test_every_metric_that_the_guides_name_is_explained():
    explained = re.findall(r"^\| `([^`]+)` \|", page_text("metrics.md"), re.MULTILINE)
    named = METRIC.findall(page_text("troubleshooting.md") + page_text("ppo.md"))
    points = {name.replace("<p>", str(point)) for name in explained for point in (0, 25, 50, 75)}
    assert len(named) > 30 and set(named) - points == set()


def ppo_table():
    """The rows of the table of docs/ppo.md, its two first lines left out."""
    found = [line[2:-2].split(" | ") for line in page_text("ppo.md").splitlines() if line.startswith("| ")]
    return found[2:]


def test_every_setting_that_the_table_of_ppo_names_is_one():
    assert len(ppo_table()) > 30 and {len(row) for row in ppo_table()} == {5}
    assert [name for row in ppo_table() for name in named_settings(row[4]) if name not in settings()] == []


def test_every_setting_of_the_older_ppo_is_one_here_or_refused_with_what_stands_for_it():
    older = {name for row in ppo_table() for name in named_settings(row[1])}
    assert len(older) > 20 and older - settings() - _OF_CONFIGS.keys() - _OF_TRAINERS.keys() == set()


def test_the_defaults_in_the_table_of_ppo_are_ours():
    """Where a number stands behind a name; a config of its own has them, without a GPU."""
    told = [pair for row in ppo_table() for pair in re.findall(r"`([a-z_]+)` (\d[\d.e-]*\d|\d)", row[4])]
    defaults = {field.name: field.default for field in dataclasses.fields(LenVMPPOConfig)}
    assert len(told) > 15 and {name: float(value) for name, value in told} == {name: defaults[name] for name, _ in told}


def test_the_config_of_the_older_ppo_is_one(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", page_text("ppo.md"), re.DOTALL)
    names = {}
    exec(code.replace('"out",', f'"{tmp_path}", use_cpu=True, bf16=False,'), names)
    assert names["config"].target_lam == 0.95 and names["config"].steps_per_generation == 1
