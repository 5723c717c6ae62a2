"""How the files of the project stand to each other and what must not be written in them, read from their text."""

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

LIBRARY = ROOT / "lenvm_rl"
# Outer rooms, from the inside out: whatever is below imports nothing of what stands here behind it.
PROGRAMS = ("reward", "eval", "recipes")
PURE = ("endings", "returns", "advantages", "shaping", "pretraining/loss", "pretraining/references")
FOLDERS = ("lenvm_rl", "reward", "eval", "recipes")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
# What is installed, downloaded, produced or kept by tools (in a linked work tree, .git is a file).
NOT_OURS = {".git", ".venv", "models", "outputs", "wandb", "build", "dist", "__pycache__", ".pytest_cache"}
NOT_TEXT = (".git", ".png", ".pdf", ".safetensors", ".parquet", ".pyc")


def name_of(path):
    """The module that a file belongs to: `trainers` for `lenvm_rl/trainers/ppo.py`, `eval` for `eval/tradeoff.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "lenvm_rl" else parts[0]


def imports_of(path):
    """Dotted names of all modules that a file imports, at its top or inside a function, relative ones resolved.

    `from lenvm_rl import gae` gives `lenvm_rl.gae`, since what is imported may be a module.
    """
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            if base[0] == "lenvm_rl" and "." not in ".".join(base):
                found.update(f"lenvm_rl.{alias.name}" for alias in node.names)
            else:
                found.add(".".join(base))
    return found


def outside(names):
    """The top-level packages among dotted names that are neither ours nor of the standard library."""
    tops = {name.split(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - set(FOLDERS)


def project_imports(path):
    """The project's modules that a file imports, public names of `lenvm_rl` replaced by the modules that hold them."""
    import lenvm_rl

    modules = set()
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "lenvm_rl" and rest:
            modules.add(lenvm_rl._MODULE_OF_NAME.get(rest[0], rest[0]))
        elif top in ("reward", "eval", "recipes"):
            modules.add(top)
    return modules


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import lenvm_rl.returns", {"lenvm_rl.returns"}),
        ("from lenvm_rl import gae, returns", {"lenvm_rl.gae", "lenvm_rl.returns"}),
        ("from .. import returns", {"lenvm_rl.returns"}),
        ("from ..returns import fit_gamma", {"lenvm_rl.returns"}),
        ("from .ppo import X", {"lenvm_rl.trainers.ppo"}),
        ("def f():\n    from trl.trainer import GRPOTrainer", {"trl.trainer"}),
    ],
)
def test_imports_are_found(line, expected, tmp_path, monkeypatch):
    """The reader of imports, on which the tests below rest, sees every form of them."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "lenvm_rl" / "trainers" / "grpo.py"
    path.parent.mkdir(parents=True)
    path.write_text(line, encoding="utf-8")
    assert imports_of(path) == expected


def test_imports_run_one_way():
    """Rooms are read off the layout: no room is imported by one that it needs itself, and no program by a library."""
    rooms = {}
    for path in SOURCES:
        if path == LIBRARY / "__init__.py":
            assert outside(imports_of(path)) == set() and project_imports(path) == set()
            continue
        rooms.setdefault(name_of(path), set()).update(project_imports(path) - {name_of(path)})
    # Raises where there is a circle, and names it.
    list(graphlib.TopologicalSorter(rooms).static_order())
    assert set().union(*rooms.values()) <= set(rooms)
    for name, used in rooms.items():
        height = PROGRAMS.index(name) if name in PROGRAMS else -1
        assert not used & set(PROGRAMS[height + 1 :] if height >= 0 else PROGRAMS), name
    assert "eval" not in rooms["recipes"]


def test_the_mathematics_needs_torch_alone():
    for name in PURE:
        assert outside(imports_of(LIBRARY / f"{name}.py")) <= {"torch"}, name


def test_trl_is_imported_by_the_trainers_and_by_programs_alone():
    users = {name_of(path) for path in LIBRARY.rglob("*.py") if "trl" in outside(imports_of(path))}
    assert users <= {"trainers", "programs"}
    # Nothing but a program reads a command line.
    readers = {path for path in LIBRARY.rglob("*.py") if "programs" in project_imports(path)}
    assert {path.name for path in readers if path.parent.name != "programs"} <= {"__main__.py"}


def test_every_package_imported_is_required():
    """What the library imports is installed with it; what the programs import, with it or one of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def packages(requirements):
        return {re.match(r"[A-Za-z0-9_.-]+", one).group() for one in requirements}

    required = packages(project["dependencies"])
    optional = {name: packages(requirements) for name, requirements in project["optional-dependencies"].items()}
    allowed_in_programs = required.union(
        *(optional[name] for name in ("demo", "eval", "math", "reasoning-gym", "smollm2", "wandb"))
    )
    for path in SOURCES:
        used = {{"yaml": "pyyaml"}.get(name, name.replace("_", "-")) for name in outside(imports_of(path))}
        allowed = required if path.is_relative_to(LIBRARY) else allowed_in_programs
        # A server is a program, too, and is installed as one.
        allowed = allowed | optional["serving"] if path.is_relative_to(LIBRARY / "serve") else allowed
        # Loaded by vLLM itself, and by nobody else.
        allowed = allowed | {"vllm"} if path.is_relative_to(LIBRARY / "decoding") and path.stem == "vllm" else allowed
        # Loaded where TRL has loaded it.
        allowed = allowed | {"vllm"} if path == LIBRARY / "trainers/engine.py" else allowed
        allowed = allowed | {"vllm"} if path.parent == ROOT / "eval/speed" else allowed
        assert used <= allowed, f"{path.relative_to(ROOT)} imports {used - allowed}: name it in pyproject.toml"


def loaded_after(statement):
    """Which of the heavy packages are loaded after a statement, in an interpreter of its own."""
    code = f"import sys; {statement}; print(*[m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_package_is_light():
    assert loaded_after("import lenvm_rl; dir(lenvm_rl)") == []
    assert loaded_after("import lenvm_rl; lenvm_rl.gae, lenvm_rl.returns, lenvm_rl.shaping") == ["torch"]


def test_every_public_name_is_there():
    import lenvm_rl

    for name in lenvm_rl.__all__:
        assert getattr(lenvm_rl, name) is not None
    assert set(lenvm_rl.__all__) <= set(dir(lenvm_rl))
    modules = {path.stem for path in LIBRARY.glob("*.py")} | {path.parent.name for path in LIBRARY.glob("*/*.py")}
    assert set(lenvm_rl._MODULES) == modules - {"__init__"}
    assert all(getattr(lenvm_rl, name).__name__ == f"lenvm_rl.{name}" for name in modules - {"__init__"})
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(lenvm_rl, "non" + "sense")


def test_the_library_has_few_rooms():
    """A newcomer sees ten modules and eight folders at most, and packages do not nest."""
    modules = [path for path in LIBRARY.glob("*.py") if path.name != "__init__.py"]
    folders = {path.parent for path in LIBRARY.rglob("*.py")} - {LIBRARY}
    assert len(modules) <= 10 and len(folders) <= 8
    assert all(path.parent == LIBRARY for path in folders)


def test_recipes_need_nothing_of_eval():
    """A policy can be trained without what compares it afterwards."""
    for path in (ROOT / "recipes").rglob("*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] == "eval"], path.name


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(node, lines):
    """Lines of code of a module, class or function: docstrings, comments and blank lines do not count."""
    first, last = (1, len(lines)) if isinstance(node, ast.Module) else (node.lineno, node.end_lineno)
    told = set()
    for inner in ast.walk(node):
        if isinstance(inner, DOCUMENTED) and ast.get_docstring(inner, clean=False) is not None:
            told.update(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    texts = (lines[number - 1].strip() for number in range(first, last + 1) if number not in told)
    return sum(bool(text) and not text.startswith("#") for text in texts)


def test_files_and_functions_stay_small():
    wrong = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        if code_lines(tree, lines) > 400:
            wrong.append(f"{path.relative_to(ROOT)}: {code_lines(tree, lines)} lines of code")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and code_lines(node, lines) > 60:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has more than 60 lines")
    assert wrong == []


def public_definitions(tree):
    """Public functions and classes at the top of a module, and constants."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [node.name] if isinstance(node, DOCUMENTED[1:]) else [t.id for t in targets if isinstance(t, ast.Name)]
        yield from ((name, node) for name in names if not name.startswith("_"))


def test_a_public_name_means_one_thing():
    """No class or function is defined twice in the project, and no constant in the library. (Every program has a
    `main`, and may have a `make_parser`; modules that log have a `logger`.)"""
    places = {}
    for path in SOURCES:
        for name, node in public_definitions(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, DOCUMENTED) or path.is_relative_to(LIBRARY):
                places.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert set(shared) <= {"main", "make_parser", "logger"}, shared


def test_public_parameters_have_types():
    wrong = []

    def look(path, body):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                look(path, node.body)
            elif isinstance(node, DOCUMENTED[2:]) and (not node.name.startswith("_") or node.name == "__init__"):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                untyped = [one.arg for one in given if one.annotation is None and one.arg not in ("self", "cls")]
                wrong.extend(f"{path.relative_to(ROOT)}:{node.lineno} {name}" for name in untyped)

    for path in SOURCES:
        look(path, ast.parse(path.read_text(encoding="utf-8")).body)
    assert wrong == []


def test_the_library_does_not_print():
    for path in LIBRARY.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        lines = [function.lineno for function in called if isinstance(function, ast.Name) and function.id == "print"]
        assert lines == [], path.relative_to(ROOT)


def is_ours(folder):
    """Whether a folder of this name holds text of the project."""
    hidden = folder.startswith(".") and folder != ".ci"
    return not hidden and folder not in NOT_OURS and not folder.endswith(".egg-info")


def our_lines():
    """`(place, line)` for every line of text in the project."""
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = sorted(name for name in subfolders if is_ours(name))
        for path in (Path(folder, name) for name in sorted(names) if not name.endswith(NOT_TEXT)):
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
                yield f"{path.relative_to(ROOT)}:{number}", line


def test_nothing_names_a_machine_or_a_registry():
    """No absolute path of somebody's machine and no package registry's host stands anywhere in the project."""
    folders = re.compile(r"(?<![\w.~*)}-])/(?:work|home|root|opt|Users)/")
    hosts = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch|npmjs\.")
    assert folders.search("see /" + "home/someone/x") and hosts.search("https://py" + "pi.org/simple")
    wrong = [(place, line) for place, line in our_lines() if folders.search(line) or hosts.search(line)]
    assert wrong == []


def test_code_lines_are_at_most_120_characters():
    wrong = [place for place, line in our_lines() if ".py:" in place and len(line) > 120]
    assert wrong == []
