"""What a type checker sees of hyperize: classes that are kept, options that are known."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import hyperize
from hyperize.config import HyperConfig, Overrides

ROOT = Path(__file__).parents[1]
SCRIPT = '''
"""A user's script, with a model that has methods of its own."""

from typing_extensions import assert_type

import torch
from torch import Tensor, nn

import hyperize as hz
from hyperize import HyperConfig, fit_, from_pretrained, hyperize, load, make_plan, report, to_dense


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3)
        self.head = nn.Linear(32, 10)

    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y


def train(weight_decay: float) -> Net:
    hyper = hyperize(Net(), compression=3, targets=[nn.Conv2d, "linear"], exclude="head")
    assert_type(hyper, Net)
    features: Tensor = hyper.features(torch.randn(1, 32, 8, 8))
    optimizer = torch.optim.SGD(hz.param_groups(hyper, weight_decay), lr=0.1)
    with hz.generated_l2(hyper) as l2, hz.cached(hyper):
        torch.autograd.backward(features.sum() + l2())
    optimizer.step()
    return hyper


def shrink() -> int:
    config = HyperConfig(targets=nn.Conv2d, tile={"3x3": (16, 32)}, include=["conv"], seed=1)
    plan = make_plan(Net(), config.replace(max_params=5000), hidden_dim=0)
    hyper = hyperize(Net(), plan, inplace=True)
    errors = fit_(hyper, Net())
    print(report(hyper), errors, HyperConfig.paper(seed=0))
    written = hz.save(hyper, "net.safetensors", dtype="int8")
    assert_type(load(Net(), written.path), Net)
    assert_type(to_dense(hyper, include="conv"), Net)
    assert_type(from_pretrained("folder", Net()), Net)
    assert_type(from_pretrained("folder"), nn.Module)
    several = hyperize(Net(), conditions=3, private=("head",), lstm={"rnn.*": "dynamic"})
    with hz.condition(several, 1):
        assert_type(hz.at_condition(several, 1), Net)
    return written.bytes
'''
WRONG = {
    "compresion": "hyperize(nn.Linear(2, 2), compresion=3)",
    "compression": 'HyperConfig(compression="ten")',
    "targets": "HyperConfig(targets=[3])",
    "recompute": "HyperConfig().replace(recompute=1.5)",
    "featurs": "hyperize(Net()).conv.featurs.x",
    "absent": "hz.absent",
    "exclude": "make_plan(Net(), exclude=0)",
    "seed": "hz.fit_plan(Net(), seed=())",
}
"""What a checker must refuse, by a word of its error."""


FIRST = SCRIPT.count("\n") + 2
"""The line of the first of them."""


def mypy(folder):
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--show-error-codes"]
    done = subprocess.run(
        [*command, "right.py", "wrong.py"],
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "Found" in done.stdout, done.stdout + done.stderr
    return done.stdout.splitlines()


def pyright(folder):
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 2
    return [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1}: {one['message']}"
        for one in found["generalDiagnostics"]
        if one["severity"] == "error"
    ]


@pytest.fixture(scope="module", params=[mypy, pyright])
def found(request, tmp_path_factory):
    """The errors in the script, and in one with a wrong line at its end for each mistake."""
    if request.param is pyright:
        pytest.importorskip("basedpyright", reason="pyright as a package that brings all it needs")
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "right.py").write_text(SCRIPT)
    wrong = "".join(f"\n{line}  # {word}" for word, line in WRONG.items())
    (folder / "wrong.py").write_text(f"{SCRIPT}{wrong}\n")
    return request.param(folder)


def test_a_users_script_has_right_types(found):
    assert not [line for line in found if line.startswith("right.py:")]


def test_mistakes_are_found(found):
    lines = {int(line.split(":")[1]) for line in found if line.startswith("wrong.py:")}
    assert lines == set(range(FIRST, FIRST + len(WRONG))), found


def test_the_typed_options_are_those_of_a_config():
    assert list(Overrides.__annotations__) == [field.name for field in fields(HyperConfig)]
    assert not Overrides.__required_keys__


def test_the_package_says_that_it_has_types():
    assert (Path(hyperize.__file__).parent / "py.typed").is_file()


def test_lazy_names_are_those_that_checkers_see():
    """What `if TYPE_CHECKING` imports in the package is what is had when it runs."""
    (block, *_) = [
        node
        for node in ast.parse(Path(hyperize.__file__).read_text()).body
        if isinstance(node, ast.If)
    ]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(hyperize.__all__)
    for name, module in seen.items():
        module_of = vars(__import__(module, fromlist=["x"]))
        assert getattr(hyperize, name) is module_of[name]
    assert set(hyperize.__all__) <= set(dir(hyperize))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        getattr(hyperize, "absent")  # noqa: B009
