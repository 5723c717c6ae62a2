"""The pages hold what the repository holds: every test, name, link and paper that they mention is there."""

import ast
import re

import pytest
from places import ROOT

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
