"""The wheel is the library and nothing else, and works where there is no checkout; the launch configs parse."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from places import ROOT


def run(*command, **options):
    """Runs a command, and shows what it said where it fails. Pip reads neither the user's settings nor an index."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_is_the_library_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lenvm_rl", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    in_wheel = {name for name in names if name.startswith("lenvm_rl/")}
    in_tree = {str(path.relative_to(ROOT)) for path in (ROOT / "lenvm_rl").rglob("*.py")}
    assert in_wheel == in_tree
    assert any(name.endswith("/licenses/LICENSE") for name in names)


USE = """
import importlib.util, json, lenvm_rl, torch

from importlib.metadata import version
print(json.dumps({
    "file": lenvm_rl.__file__,
    "version": [lenvm_rl.__version__, version("lenvm-rl")],
    "return": lenvm_rl.returns.discounted_return(torch.tensor([2], dtype=torch.int64), 0.5).tolist(),
    "model": lenvm_rl.LengthValueModel.__module__,
    "checkout": [name for name in ("reward", "recipes", "tests") if importlib.util.find_spec(name)],
}))
"""


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    """Installed into an environment that has the dependencies and nothing of this checkout.

    The dependencies are borrowed from the environment that runs the tests, by a `.pth` file: Python does not follow
    `.pth` files found in a folder added so, hence the editable install there stays invisible.
    """
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    [site] = home.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")

    seen = json.loads(run(python, "-I", "-c", USE, cwd=tmp_path).splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(site)
    assert seen["version"][0] == seen["version"][1]
    # Two tokens to come at γ = 0.5: -(1 - 0.5²).
    assert seen["return"] == [-0.75]
    assert seen["model"] == "lenvm_rl.modeling.length_value_model"
    assert seen["checkout"] == []


def pins():
    """`{name: version}` of constraints.txt; each line must pin one version exactly, without a local suffix."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {}
    for requirement in requirements:
        [specifier] = requirement.specifier
        assert specifier.operator == "==" and "+" not in specifier.version, str(requirement)
        found[requirement.name.lower().replace("_", "-")] = Version(specifier.version)
    return found


def test_constraints_satisfy_the_declared_ranges():
    """Every requirement of pyproject.toml, extras included, is pinned to a version within its range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    pinned = pins()
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.name != "lenvm-rl":
            assert pinned[requirement.name] in requirement.specifier, str(requirement)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("single_process", "NO"), ("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")],
)
def test_accelerate_reads_the_launch_configs(name, kind):
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert config.num_processes == (1 if name == "single_process" else 8)
    # The recipe's own setting decides the precision.
    assert config.mixed_precision == "no"


def test_the_hooks_and_the_workflow_do_what_continuous_integration_does():
    [pinned] = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ruff==")]
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["rev"] == f"v{pinned.removeprefix('ruff==')}"
    [job] = yaml.safe_load((ROOT / ".github/workflows/tests.yaml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    versions = job["strategy"]["matrix"]["python"]
    assert all(Version(each) in SpecifierSet(required) for each in versions) and len(versions) == 3
