"""The layout of the package: who may import whom, and what every public name owes its reader."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hyperize as package

PACKAGE = Path(package.__file__).parent
ROOT = PACKAGE.parent
ORDER = [
    *(
        "config",
        "writing",
        "progress",
        "tables",
        "source",
        "products",
        "tensors",
        "factorized",
        "tiling",
        "moments",
        "cp",
    ),
    *("family", "tiles", "channels", "separable", "families", "reading", "conditions"),
    "caching",
    *(
        "layers",
        "private",
        "kernels",
        "recurrence",
        "dynamic",
        "sites",
        "plan",
        "search",
        "hypernet",
        "parts",
    ),
    *("calls", "rewrite", "networks", "rounding"),
    *(
        "counting",
        "teacher",
        "drawing",
        "page",
        "reporting",
        "timm_models",
        "files",
        "folders",
        "graph",
        "onnx",
    ),
    *("training", "muon", "distributed", "solver", "fitting"),
    *("outputs", "factories", "commands", "cli", "__main__"),
]
"""Each module imports only from modules before it."""
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg", ".sh", ".ini", ""}


def tree(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module):
    """The modules of this package that a module imports, at its top or inside its functions."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if node.module == "hyperize":
                names = (alias.name for alias in node.names)
                yield from (name for name in names if not name.startswith("__"))
            elif node.module and node.module.startswith("hyperize."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "hyperize":
                    yield alias.name.partition(".")[2]


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_above_it(module):
    above = ORDER[: ORDER.index(module)]
    assert set(imports(module)) <= set(above)


def test_imports_are_seen():
    assert any(list(imports(module)) for module in ORDER)


def test_no_module_is_named_like_a_public_name():
    assert not set(package.__all__) & set(MODULES)
    for name in package.__all__:
        assert not inspect.ismodule(getattr(package, name)), name


def test_the_package_itself_only_lists():
    """Names for checkers, and what imports them when the first is used (see test_types.py)."""
    for node in tree("__init__").body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        lazily = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        listing = isinstance(node, ast.ImportFrom | ast.Assign)
        assert docstring or lazily or listing, ast.unparse(node)


def test_arguments_are_read_without_torch():
    """Help and wrong arguments are answered before anything heavy is imported."""
    light = {"hyperize", "rich", "safetensors", "typing_extensions"}
    for module in ("cli", "outputs", "config", "writing"):
        for node in tree(module).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in (name.partition(".")[0] for name in names):
                assert name in light | sys.stdlib_module_names, f"{module}: {name}"


@pytest.mark.parametrize("name", package.__all__)
def test_every_public_name_is_documented(name):
    thing = getattr(package, name)
    assert inspect.getdoc(thing), name
    assert not inspect.isclass(thing) or "__doc__" in vars(thing)  # its own, not its base's
    methods = {
        key: member
        for key, member in (vars(thing).items() if inspect.isclass(thing) else ())
        if not key.startswith("_") and (callable(member) or isinstance(member, property))
    }
    for key, member in methods.items():
        assert inspect.getdoc(member), f"{name}.{key}"


@pytest.mark.parametrize(
    "name", [n for n in package.__all__ if inspect.isfunction(getattr(package, n))]
)
def test_every_argument_of_a_public_function_is_documented(name):
    function = getattr(package, name)
    doc = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^ +\**{parameter}: ", doc, re.MULTILINE), f"{name}: {parameter}"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(tree(module))


@pytest.mark.parametrize("module", ORDER)
def test_all_lists_what_a_module_offers(module):
    names = vars(__import__(f"hyperize.{module}", fromlist=["__all__"]))
    assert set(names["__all__"]) <= set(names)


def tracked():
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_is_left_unfinished():
    files = [path for path in tracked() if path.suffix in TEXT and path != Path(__file__)]
    assert PACKAGE / "config.py" in files
    left = [
        f"{path.relative_to(ROOT)}:{at}: {line.strip()}"
        for path in files
        for at, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert not left
