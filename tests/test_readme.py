"""The README keeps its word: its code runs, and its test command is the one that CI runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    assert "targets, parameters" in capsys.readouterr().out
    assert namespace["output"].shape == (7, 3, 128)
    h, c = namespace["state"]
    assert (h.shape, c.shape) == ((2, 3, 128), (2, 3, 128 + 2 * 32))


def test_ci_runs_the_readme_test_command():
    command = next(block for block in blocks("sh") if "pytest" in block).strip()
    install, test = command.split(" && ")
    script = (ROOT / ".ci" / "run").read_text()
    assert test in script
    assert install.removeprefix("pip install ") in script


def test_examples_that_it_names_exist():
    for name in re.findall(r"examples/\w+\.py", README):
        assert (ROOT / name).is_file()
