"""The package as it is installed: what is in the wheel, what it needs, what it says of itself."""

import ast
import email
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
SOURCES = sorted((ROOT / "hyperize").glob("*.py"))


def names(table):
    """Packages of a list in pyproject.toml."""
    found = re.search(rf"^{table} = \[(.*?)\]$", PROJECT, re.DOTALL | re.MULTILINE)[1]
    return set(re.findall(r'"([\w-]+)(?:\[\w+\])?[<>=~]', found))


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_what_is_always_imported_is_a_dependency():
    found = {name for path in SOURCES for name in imported(ast.parse(path.read_text()).body)}
    others = {name.replace("_", "-") for name in found - sys.stdlib_module_names - {"hyperize"}}
    # timm is imported where it is needed, as by hyperize.muon, which is imported by itself
    assert others - {"timm"} == names("dependencies") - {"timm"}


def test_every_extra_but_those_of_tools_is_among_the_test_packages():
    for extra in ("plot", "export", "train", "transformers"):
        assert names(extra) <= names("test"), extra


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.long
def test_the_wheel_holds_the_package_alone(built):
    with zipfile.ZipFile(built[0]) as wheel:
        files = [name for name in wheel.namelist() if ".dist-info/" not in name]
        (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        about = email.message_from_bytes(wheel.read(metadata))
    assert sorted(files) == sorted([*(f"hyperize/{p.name}" for p in SOURCES), "hyperize/py.typed"])
    assert about["Name"] == "hyperize"
    assert about["Author"]
    kinds = {line.split(",")[0] for line in about.get_all("Project-URL")}
    assert kinds == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.10"} <= set(
        about.get_all("Classifier")
    )
    assert "hyperize" in about.get_payload()  # the README


@pytest.mark.long
def test_the_sdist_holds_what_is_tested(built):
    with tarfile.open(built[1]) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "tests/test_packaging.py",
        "docs/api.md",
    ):
        assert name in files


@pytest.mark.long
def test_the_wheel_works_in_an_empty_environment(built, tmp_path):
    """Empty of hyperize; its dependencies, which are gigabytes, are those of this environment."""
    venv.create(tmp_path, with_pip=True)
    folder = "Scripts" if sys.platform == "win32" else "bin"
    python = tmp_path / folder / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, built[0]], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
    site = Path(subprocess.run([python, "-c", where], **run).stdout.strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import hyperize; hyperize.hyperize; print(hyperize.__file__)"
    done = subprocess.run([python, "-c", code], **run, env={})
    assert Path(done.stdout.strip()).parent == site / "hyperize"
    done = subprocess.run([tmp_path / folder / "hyperize", "--version"], **run, env={})
    assert done.stdout.startswith("hyperize ")
    command = [tmp_path / folder / "hyperize", "report", "test_resnet", "--compression", "2"]
    assert "layer4" in subprocess.run(command, **run, env={}).stdout
