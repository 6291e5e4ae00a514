"""The documentation keeps its word: its code runs, the site builds, nothing is missing from it."""

import argparse
import doctest
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import timm
import torch
import torch.distributed as dist
from models import randomise
from PIL import Image
from safetensors.torch import save_file
from test_architecture import ORDER

import hyperize
from hyperize.cli import main
from hyperize.layers import registered_kinds

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CI = (ROOT / ".ci" / "run").read_text()
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = (ROOT / "examples", ROOT / "benchmarks")
PROJECT = "https://github.com/hyperize/hyperize"
RAW = "https://raw.githubusercontent.com/hyperize/hyperize"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOOLS = ("pytest", "ruff", "mypy")
"""Commands that CI runs as they stand in the documentation."""
FENCE = re.compile(r"^( *)(```+|~~~+)(.*?)\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)


def page_id(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    """The fenced blocks of a page in order, as (language, code)."""
    text = path.read_text()
    found = [(match[3].strip(), match[4]) for match in FENCE.finditer(text)]
    assert len(found) * 2 == len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)), path
    return found


# ------------------------------------------------------------------------------------- code blocks
@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what a reader has: a teacher's weights, images, and what torchrun sets."""
    monkeypatch.chdir(tmp_path)
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (one | {"MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
    specs = dict(hyperize.layers._SPECS)
    save_file(
        randomise(timm.create_model("test_efficientnet"), 0).state_dict(),
        "test_efficientnet.safetensors",
    )
    create = timm.create_model
    monkeypatch.setattr(  # a reader has a network; names and shapes are the same without
        timm, "create_model", lambda name, pretrained=False, **options: create(name, **options)
    )
    Path("images", "some").mkdir(parents=True)
    for i in range(8):
        noise = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(f"images/some/{i}.png")
    yield
    hyperize.layers._SPECS.clear()
    hyperize.layers._SPECS.update(specs)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_blocks_run_in_order(path, workplace, capsys):
    namespace = {"__name__": "__main__"}
    printed = None
    for language, code in blocks(path):
        if language == "text":  # the output of the block before
            compare = doctest.OutputChecker().check_output
            assert compare(code, printed, doctest.ELLIPSIS), f"{code}\nis not\n{printed}"
            printed = None
            continue
        capsys.readouterr()
        if language == "python":
            exec(compile(code, path.name, "exec"), namespace)
        elif language == "sh":
            for command in commands(code):
                run(command)
        elif language == "bibtex":  # see test_the_citation_is_of_this_version
            pass
        else:
            pytest.fail(f"a block of {language!r}, which no test can run")
        printed = capsys.readouterr().out


def commands(code):
    """The commands of a shell block, as lists of words."""
    code = code.replace("\\\n", " ")
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            at = words.index("&&")
            yield words[:at]
            words = words[at + 1 :]
        if words:
            yield words


def run(command):
    """Runs a command of the documentation, or, where it takes long, checks that it would run."""
    program, *args = command
    if program == "hyperize":
        assert main(args) == 0, command
    elif program == "python":
        parse_script(args)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(args)
        parse_script([launch.training_script, *launch.training_script_args])
    elif command[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(args[1:])
        parse_script([launch.training_script, *launch.training_script_args])
    elif command[:3] == ["pip", "install", "-e"]:
        (place,) = args[2:]
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", place)[1]
        known = (ROOT / "pyproject.toml").read_text()
        assert all(f"\n{extra} = [" in known for extra in (extras or "test").split(",")), place
    elif program in TOOLS:
        assert re.search(rf"(^|&& ){re.escape(shlex.join(command))}$", CI, re.MULTILINE), command
    elif command == ["zensical", "build", "--strict"]:
        pass  # it is run by the fixture `site`
    else:
        pytest.fail(f"no test can run {shlex.join(command)!r}")


class Parsed(Exception):
    """The arguments of a script were right."""


def parse_script(args):
    """Runs a script of this project until it has read its arguments."""
    script, *argv = args
    if script == "-m":
        package, *argv = argv
        script = package.replace(".", "/")
        script += ".py" if "." in package else "/__main__.py"
    path = ROOT / script
    assert path.is_file(), script
    assert path.parent in SCRIPTS, script
    of_a_package = script.startswith("benchmarks/") and args[0] == "-m"
    module = f"benchmarks.{path.stem}" if of_a_package else path.stem
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        raise Parsed(parse(self, *args))

    with pytest.MonkeyPatch.context() as patch:
        for folder in (ROOT, *SCRIPTS):
            patch.syspath_prepend(folder)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            importlib.import_module(module).main(argv)


@pytest.mark.parametrize(
    "command",
    [
        "python examples/quickstart.py --modle resnet18",
        "python examples/absent.py",
        "python -m benchmarks --slow",
        "python -m absent",
        "python -m benchmarks.pictures --slow",
        "torchrun --nproc-per-node 2 examples/quickstart.py --modle resnet18",
        "accelerate launch --num_processes 2 examples/quickstart.py --modle resnet18",
        "pip install -e '.[absent]'",
        "pytest --fast",
        "hyperize report resnet5",
        "curl example.org",
    ],
)
def test_wrong_commands_are_found(command, workplace):
    (words,) = commands(command)
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        run(words)


def test_launchers_are_understood():
    run(shlex.split("torchrun --nproc-per-node 2 examples/quickstart.py --model resnet18"))
    run(shlex.split("accelerate launch --num_processes 2 examples/quickstart.py --model resnet18"))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_code_is_in_fences(path):
    """Indented blocks are for formulas: code in them would not be run."""
    text = FENCE.sub("", path.read_text())
    indented = re.findall(r"(?<=\n\n)(?: {4}.*\n)+", text)
    code = re.compile(r"^ +(?:import|from|def|class|pip|python|hyperize|print)\b", re.MULTILINE)
    assert not [block for block in indented if code.search(block)]


def test_ci_runs_the_readme_test_command():
    command = next(code for language, code in blocks(README) if "pytest" in code).strip()
    install, test = command.split(" && ")
    assert test in CI
    assert install.removeprefix("pip install ") in CI


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_files_that_it_names_exist(path):
    text = path.read_text()
    for name in re.findall(r"(?:examples|benchmarks|tests|docs|hyperize)/\w+\.\w+", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(\w+\.py)`", text):
        assert list(ROOT.glob(f"*/{name}")), name


def test_figures_are_the_same_everywhere():
    """A row of figures that stands on several pages is copied, not retyped."""
    figures = re.compile(r"\d[\d.,]*(?: %)?")
    rows = {}
    for path in PAGES:
        for line in path.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if line.startswith("|") and len(figures.findall(line)) > 2:
                rows.setdefault(cells[0], set()).add(tuple(cells[1:]))
    assert not {name: found for name, found in rows.items() if len(found) > 1}


def test_figures_of_the_readme_are_in_the_docs():
    """As they are, or with fewer digits."""
    number = re.compile(r"(?<![\w.,])(?:\d+\.\d+|\d{1,3}(?:,\d{3})+)(?![\w.,]*\w)")
    prose = re.sub(r"\]\([^)]*\)", "]", FENCE.sub("", README.read_text()))
    known = {
        value for path in (ROOT / "docs").glob("*.md") for value in number.findall(path.read_text())
    }
    floats = [float(value) for value in known if "," not in value]
    rounded = {f"{value:.{digits}f}" for value in floats for digits in (1, 2)}
    versions = set(re.findall(r"(?:torch|Python)\W*(\d+\.\d+)", prose))
    found = set(number.findall(prose))
    assert len(found) > 30
    assert found - known - rounded - versions == set()


def test_every_extra_is_in_the_readme():
    project = (
        (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    )
    extras = re.findall(r"^(\w+) = \[", project.partition("\n[")[0], re.MULTILINE)
    table = README.read_text().partition("| extra, ")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(extras)


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    citation = dict(re.findall(r'^([\w-]+): "?(.+?)"?$', text, re.MULTILINE))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == hyperize.__version__
    assert citation["message"]
    (entry,) = re.findall(r"@software\{.*?\n\}", README.read_text(), re.DOTALL)
    fields = dict(re.findall(r"(\w+) = \{+(.*?)\}+,?$", entry, re.MULTILINE))
    assert fields["version"] == citation["version"]
    assert fields["title"] == citation["title"]
    assert f"authors:\n  - name: {fields['author']}\n" in text
    assert fields["url"] == citation["url"] == PROJECT


# -------------------------------------------------------------------------------------------- site
class Page(HTMLParser):
    """What an HTML page links to, what it loads, and where one can link to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and "href" in attributes:
            self.links.add(attributes["href"])
        elif tag == "link" and "canonical" not in attributes.get("rel", ""):
            self.loads.add(attributes["href"])
        elif "src" in attributes:
            self.loads.add(attributes["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: its folder, and its pages by path."""
    source = tmp_path_factory.mktemp("source")  # where the build leaves its cache
    for name in ("docs", "hyperize"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    nowhere = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://[::1]:9"
    )
    done = subprocess.run(
        command, cwd=source, env=os.environ | nowhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "No issues found" in done.stdout + done.stderr, done.stderr
    folder = source / "build" / "site"
    return folder, {path: Page(path.read_text()) for path in folder.rglob("*.html")}


def test_every_page_is_built(site):
    folder, _ = site
    for path in PAGES[2:]:
        assert (folder / f"{path.stem}.html").is_file()


def test_internal_links_and_images_resolve(site):
    folder, pages = site
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # served anywhere, so its links are absolute
            continue
        for link in page.links | page.loads:
            url = urlsplit(link)
            if url.scheme in ("http", "https", "data", "mailto"):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file() or (
                url.fragment
                and target in pages
                and not url.fragment.startswith("__")  # anchors of line numbers in code
                and unquote(url.fragment) not in pages[target].ids
            ):
                broken.append(f"{path.relative_to(folder)} -> {link}")
    assert not broken


def test_pages_load_nothing_from_elsewhere(site):
    folder, pages = site
    for path, page in pages.items():
        for load in page.loads:
            assert not urlsplit(load).netloc, f"{path.relative_to(folder)} loads {load}"
    for style in folder.rglob("*.css"):
        assert not re.search(r"url\(\W?https?:|@import", style.read_text()), style


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_the_search_works_from_a_folder(site):
    """Opened as a file, without a server, and without a request to another host."""
    from playwright.sync_api import sync_playwright

    folder, _ = site
    asked = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "index.html").as_uri())
        box = page.locator("input:focus")
        for _ in range(60):  # until the page's script is ready
            page.keyboard.press("Control+k")
            page.wait_for_timeout(1000)
            if box.count():
                break
        box.type("generated_l2")
        page.locator("a[href*='api.html#hyperize.generated_l2']").first.wait_for()
        browser.close()
    assert not [url for url in asked if not url.startswith("file:")]


@pytest.mark.parametrize("path", PAGES[:2], ids=page_id)
def test_links_of_root_pages_resolve(path, site):
    folder, pages = site
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if path == README:  # relative links break on a package's page
            assert urlsplit(link).scheme == "https", link
        link = link.removeprefix(f"{PROJECT}/blob/main/").removeprefix(f"{RAW}/main/")
        url = urlsplit(link)
        if url.scheme:
            continue
        assert (ROOT / url.path).is_file(), link
        if url.fragment:
            assert url.fragment in pages[folder / f"{Path(url.path).stem}.html"].ids, link


@pytest.mark.parametrize("name", hyperize.__all__)
def test_every_public_name_is_in_the_reference(name, site):
    folder, pages = site
    assert f"\n::: hyperize.{name}\n" in (ROOT / "docs" / "api.md").read_text()
    assert f"hyperize.{name}" in pages[folder / "api.html"].ids


def test_the_reference_names_nothing_else():
    names = re.findall(
        r"^::: hyperize\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE
    )
    assert sorted(names) == sorted(hyperize.__all__)


# ------------------------------------------------------------------------------------ completeness
def test_every_option_is_in_the_table():
    text = (ROOT / "docs" / "options.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", text, re.MULTILINE))
    expected = {field.name: field.default for field in fields(hyperize.HyperConfig)}
    assert list(rows) == list(expected)
    assert {name: eval(default) for name, default in rows.items()} == expected


def test_every_command_and_flag_is_described(capsys):
    text = (ROOT / "docs" / "cli.md").read_text()
    with pytest.raises(SystemExit):
        main(["--help"])
    names = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert "report" in names
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == names
    for name in names:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert not [flag for flag in flags if flag not in text], name


def test_every_kind_of_layer_is_in_the_table():
    text = (ROOT / "docs" / "layers.md").read_text()
    listed = re.findall(r"^\| (`.+?`) \| `nn", text, re.MULTILINE)
    assert sorted(registered_kinds()) == sorted(re.findall(r"`(\w+)`", ", ".join(listed)))


def test_the_architecture_names_every_module_in_order_of_imports():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r"^\| `hyperize/(\w+)\.py` \|", text, re.MULTILINE) == ORDER
