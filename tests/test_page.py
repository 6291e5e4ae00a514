"""The report to look at: the page in a real browser and by the letter, and the chart."""

import base64
import copy
import functools
import gc
import io
import itertools
import json
import pickle
import re
import shutil
import sys
import weakref
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from models import CRNN, Convolutions, Stage, meta
from PIL import Image
from torch import nn

from hyperize import (
    ConfigError,
    FileError,
    ModelError,
    fit_,
    hyperize,
    make_plan,
    report,
    to_dense,
    to_html,
)
from hyperize.drawing import (
    DOTS,
    PLACES,
    SHADES,
    map_picture,
    peak_of,
    picture,
    project,
    snapshot,
    spread,
)
from hyperize.reporting import Source, find_groups

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update", "--disable-sync"]
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}
HOSTILE = ("<script>alert(1)</script>", '"onload="alert(2)', "a&lt;b</td>", "it's", "$x^2$" * 40)
VOID = {"meta", "link", "img", "br", "wbr", "input"}


def hostile():
    model = nn.Sequential(nn.Conv2d(32, 32, 3))
    for name in HOSTILE:
        model.add_module(name, nn.Conv2d(32, 32, 3))
    model.add_module("<i>small</i>", nn.Conv2d(1, 2, 1))
    return model


def trained(hyper):
    """Moves the generator as training would; without that there is nothing to see."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in hyper.hypernet.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator)
    return hyper


def fitted():
    """A report with a teacher, of which two weights are missed more than the third."""
    torch.manual_seed(0)
    teacher = Stage()
    hyper = hyperize(teacher, compression=4, embeddings="tile")
    fit_(hyper, teacher, sweeps=3)
    return report(hyper, teacher=teacher)


CASES = {
    "tiles": lambda: report(trained(hyperize(CRNN(), compression=4))),
    "channels": lambda: report(
        trained(hyperize(Convolutions(64), compression=3, embeddings="channel"))
    ),
    "dynamic": lambda: report(trained(hyperize(CRNN(), compression=2, lstm="dynamic"))),
    "plan": lambda: report(make_plan(meta("resnet152"))),
    "hostile": lambda: report(trained(hyperize(hostile(), compression=4))),
    "fitted": fitted,
}


@functools.cache
def case(name):
    return CASES[name]()


@pytest.fixture(params=CASES)
def result(request):
    return case(request.param)


def sources_of(hyper):
    """Where the weights of a model with one hypernetwork come from."""
    (group,) = find_groups(hyper)
    return [
        Source(p.site.name, group.layers[p.site.path], p.site.param, p.grid)
        for p in group.plan.sites
    ]


def html_of(result, tmp_path):
    assert result.to_html(tmp_path / "page.html") == tmp_path / "page.html"
    return (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a report's page; in the end, whatever was done, nothing else was asked for or said."""
    contexts, asked, said = [], [], []
    file = tmp_path / "page of a model.html"

    def show(result, viewport=LAPTOP, **options):
        to_html(result, file)
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
        page.goto(file.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()] * len(contexts)
    assert said == []


def name_of(row, result):
    return ".".join(part for part in (row.path, row.param) if part) or result.model


def rows_of(page, part="tbody"):
    """The texts and the values of a part of the table, as they stand in the document now."""
    return page.evaluate(
        f"""[...document.querySelectorAll("#weights {part} tr")].map((row) =>
            [...row.cells].filter((cell) => !cell.classList.contains("bar"))
                .map((cell) => cell.dataset.value ?? cell.textContent))"""
    )


# --- In the browser -----------------------------------------------------------------------------


def test_figures_read_back_are_the_reports(show, result):
    page = show(result)
    assert page.title() == f"{result.model}: compression report"
    assert rows_of(page) == [
        [
            str(at),
            name_of(row, result),
            row.kind,
            "x".join(map(str, row.shape)),
            str(row.dense_params),
            str(row.hyper_params),
            repr(row.dense_params / row.hyper_params),
            *([] if result.error is None else [repr(row.error)]),
        ]
        for at, row in enumerate(result.sites, 1)
    ]
    shared, total = rows_of(page, "tfoot")
    assert shared[5] == str(result.hypernet_params)
    assert str(result.dense_params) in total
    assert repr(result.compression) in total
    cards = page.locator("#totals > div").all_inner_texts()
    for card, dense, hyper in zip(
        cards,
        (result.dense_params, result.total_dense_params, result.dense_bytes),
        (result.hyper_params, result.total_hyper_params, result.hyper_bytes),
        strict=True,
    ):
        assert f"{dense:,} → {hyper:,}" in card
        assert f"{dense / hyper:.2f}×" in card  # noqa: RUF001 the sign on the page
    stays = page.locator("#skipped tbody th").all_text_contents()
    assert stays == [skip.path for skip in result.skipped]


@pytest.mark.parametrize("scale", ["square-root scale", "linear scale"])
def test_bars_are_as_long_as_the_figures_say(show, result, scale):
    page = show(result)
    page.get_by_label(scale).check()
    bars = page.evaluate(
        """[...document.querySelectorAll("#weights :is(tbody, tfoot) td.bar")].map((cell) => [
            cell.parentNode.cells[1].textContent,
            cell.clientWidth - 2 * parseFloat(getComputedStyle(cell).paddingLeft),
            ...["dense", "hyper"].map((side) =>
                cell.querySelector(`i.${side}`)?.getBoundingClientRect().width ?? 0)])"""
    )
    expected = [(name_of(r, result), r.dense_params, r.hyper_params) for r in result.sites]
    expected.append(("hypernet (shared)", 0, result.hypernet_params))
    largest = max(max(dense, hyper) for _, dense, hyper in expected)
    power = 1 if scale.startswith("linear") else 0.5
    for (name, full, *widths), (path, *sizes) in zip(bars, expected, strict=True):
        assert name == path
        for width, size in zip(widths, sizes, strict=True):
            assert width == pytest.approx(full * (size / largest) ** power, abs=0.01 * full + 1)


def test_the_filter_leaves_what_has_all_words(show):
    result = case("tiles")
    page = show(result)
    everything = page.locator("#weights tbody tr:visible").count()
    assert everything == len(result.sites)
    page.get_by_label("Filter of the weights").fill("WEIGHT 3x3")
    rows = [row for row in result.sites if row.shape[2:] == (3, 3)]
    assert 0 < len(rows) < everything
    assert page.locator("#weights tbody tr:visible th").all_text_contents() == [
        name_of(row, result) for row in rows
    ]
    dense = sum(row.dense_params for row in rows)
    hyper = sum(row.hyper_params for row in rows)
    said = f"{len(rows)} of {everything} weights, {dense:,} → {hyper:,} parameters"
    assert page.inner_text("#shown") == said
    page.get_by_label("Filter of the weights").fill("")
    assert page.locator("#weights tbody tr:visible").count() == everything
    assert page.inner_text("#shown") == ""


@pytest.mark.parametrize("name", ["plan", "fitted"])
def test_a_phone_shows_all_numbers(show, name):
    result = case(name)
    page = show(result, PHONE)
    row, site = page.locator("#weights tbody tr").first, result.sites[0]
    row.scroll_into_view_if_needed()
    wanted = [f"{site.dense_params:,}", f"{site.hyper_params:,}"]
    wanted += [] if site.error is None else [f"{site.error:.3f}"]
    for text in wanted:
        box = row.get_by_text(text, exact=True).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]


def test_the_page_says_what_it_is_of(tmp_path):
    torch.manual_seed(0)
    hyper = hyperize(timm.create_model("test_resnet"), compression=4, exclude="layer1")
    result = report(hyper)
    result.to_html(tmp_path / "page.html", title="after <b>all</b>")
    page = Outline((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.data["h1"] == ["after <b>all</b>"]
    keys = page.data["dt"][:5]
    said = dict(zip(keys, page.data["dd"], strict=False))
    assert said["model"] == "test_resnet"
    assert "compression 4" in said["request"]
    assert "layer1" in said["request"]
    assert f"embeddings of {hyper.hypernet.plan.embedding_dim}" in said["built"]
    assert said["report made"] == result.date
    assert f"torch {torch.__version__.partition('+')[0]}" in said["versions"]


def test_headings_sort_by_mouse_and_by_keyboard(show):
    result = case("tiles")
    page = show(result)
    before = rows_of(page)

    def state():
        return page.evaluate(
            "[...document.querySelectorAll('#weights thead th:not(.bar)')].map((h) => h.ariaSort)"
        )

    assert state() == ["ascending", *[None] * 6]
    for column, title in enumerate(("weight", "kind", "shape", "dense", "hyper", "ratio"), 1):
        numeric = column > 3
        button = page.get_by_role("button", name=title, exact=True)
        for click in range(2):
            if click:
                button.focus()
                page.keyboard.press("Enter")
            else:
                button.click()
            down = numeric != bool(click)  # sizes begin with the largest
            assert state()[column] == ("descending" if down else "ascending")
            assert [s for at, s in enumerate(state()) if at != column] == [None] * 6
            cells = [row[column] for row in rows_of(page)]
            if numeric:
                assert cells == sorted(cells, key=float, reverse=down)
            elif title == "kind":
                assert cells == sorted(cells, reverse=down)
            elif title == "shape":
                assert cells == sorted(
                    cells, key=lambda c: [int(n) for n in c.split("x")], reverse=down
                )
        assert sorted(rows_of(page)) == sorted(before)
    page.get_by_role("button", name="#").click()
    assert rows_of(page) == before


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_nothing_is_wider_than_the_screen(show, result, viewport):
    page = show(result, viewport)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    wider = page.evaluate(
        """[...document.querySelectorAll("body *")]
            .filter((e) => !e.closest("table, path, rect, line, label"))
            .filter((e) => e.getBoundingClientRect().right > innerWidth
                || (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline"
                    && !e.matches(".scroll:has(table)")))
            .map((e) => e.outerHTML.slice(0, 200))"""
    )
    assert wider == []


def test_pictures_are_seen(show):
    result = case("tiles")
    page = show(result, PHONE)
    sizes = page.evaluate(
        """[...document.querySelectorAll(".kernels img")]
            .map((i) => [i.complete, i.naturalWidth, i.clientWidth, i.alt])"""
    )
    names = ["trunk.0.weight", "trunk.4.weight", "lstm.weight_ih_l0"]
    assert [alt.rpartition(" ")[2] for *_, alt in sizes] == names
    assert all(done and width > 100 and shown > 100 for done, width, shown, _ in sizes)
    box = page.locator("svg.plane").bounding_box()
    assert min(box["width"], box["height"]) > 300
    assert page.locator("svg.plane path").count() == len(result.sites)
    assert f"all {result.snapshot.total}" in page.inner_text("#embeddings")
    assert page.locator(".maps img").count() == len(result.sites)


def test_pointing_names_what_is_there(show):
    result = case("fitted")
    page = show(result)
    names = {
        "errors": f"{result.sites[0].path}.weight: {result.sites[0].error:.3f}",
        "maps": f"{result.sites[0].path}.weight, ",
        "embeddings": f"{result.sites[0].path}.weight",
    }
    things = {"errors": "rect", "maps": "img", "embeddings": "path"}
    for section, name in names.items():
        thing = page.locator(f"#{section} {things[section]}").first
        thing.dispatch_event("pointerover", {"bubbles": True})
        assert page.inner_text(f"#{section} output").startswith(name)
    image = page.locator(".kernels img").first
    box = image.bounding_box()
    kernels = result.snapshot.kernels[0]
    rows, columns = kernels.values.shape[:2]
    at = {"x": box["width"] * 1.5 / columns, "y": box["height"] * (rows - 0.5) / rows}
    image.hover(position=at)
    kernel = (rows - 1) * columns + 1
    expected = f"{kernels.name}[{kernel // kernels.inputs}, {kernel % kernels.inputs}]"
    assert page.inner_text("#kernels output") == expected


def test_light_and_dark(show):
    result = case("plan")
    luminance = {}
    for scheme in ("light", "dark"):
        page = show(result, color_scheme=scheme)
        for name in ("backgroundColor", "color"):
            colour = page.evaluate(f"getComputedStyle(document.body).{name}")
            luminance[scheme, name] = sum(map(int, re.findall(r"\d+", colour))) / 3
    assert luminance["light", "backgroundColor"] > 240 > 60 > luminance["light", "color"]
    assert luminance["dark", "backgroundColor"] < 60 < 200 < luminance["dark", "color"]


def test_without_scripts_sorting_and_filter_are_missing(show):
    result = case("tiles")
    page = show(result, java_script_enabled=False)
    assert page.locator("#weights tbody tr").count() == len(result.sites)
    assert page.locator("button").count() == 0
    assert page.locator(".kernels img").count() == 3
    assert page.locator("#filter:visible").count() == 0


# --- By the letter ------------------------------------------------------------------------------


class Outline(HTMLParser):
    """The elements of a page, in order, with their attributes; they have to nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.data = [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.data.setdefault(self.open[-1], []).append(data)


def test_markup(result, tmp_path):
    page = Outline(html_of(result, tmp_path))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == tags.count("style") == tags.count("h1") == 1
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")]
        if tag == "th":
            assert attrs["scope"] in ("col", "row")
        if tag == "img":
            assert attrs["alt"]
            assert attrs["src"].startswith("data:image/png;base64,")
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or attrs["aria-label"]
        if "src" in attrs or "href" in attrs:
            assert attrs.get("src", attrs.get("href")).startswith("data:")
    (style,) = page.data["style"]
    assert "url(" not in style
    assert "@import" not in style
    heads = [attrs for tag, attrs in page.elements if tag == "th" and attrs["scope"] == "row"]
    assert len(heads) == len(result.sites) + 2 + len(result.skipped)


def test_hostile_names_are_text(tmp_path):
    result = case("hostile")
    assert {row.path for row in result.sites} >= set(HOSTILE)
    text = html_of(result, tmp_path)
    assert "<script>alert" not in text
    assert "<i>" not in text
    names = "".join(Outline(text).data["th"])
    assert all(f"{name}.weight" in names for name in HOSTILE)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: report(make_plan(Stage())), "report of a plan"),
        (lambda: report(hyperize(Stage())), "untrained"),
        (lambda: report(hyperize(Stage(), compression=4, hidden_dim=4)), "untrained"),
        (lambda: report(hyperize(Stage(), compression=2, embeddings="channel")), "untrained"),
        (lambda: report(hyperize(meta("resnet18"))), "on the meta device"),
        (lambda: report(hyperize(nn.LSTM(8, 8), lstm="dynamic")), "generated from embeddings"),
    ],
    ids=["plan", "untrained", "two layers", "channels", "meta", "dynamic"],
)
def test_without_values_the_page_says_why(make, reason, tmp_path):
    text = html_of(make(), tmp_path)
    assert text.count("<img") == text.count("<svg") == 0
    (line,) = re.findall('<p class="soft no-pictures">(.*)</p>', text)
    assert reason in line


@pytest.mark.parametrize(
    "options", [{}, {"hidden_dim": 4}, {"embeddings": "channel"}, {"embeddings": "separable"}]
)
def test_one_step_of_training_is_seen(options, tmp_path):
    hyper = hyperize(Stage(), compression=2, **options)
    optimizer = torch.optim.SGD(hyper.parameters(), lr=0.1)
    hyper(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert report(hyper).snapshot.reason == ""


def test_large_models_give_small_pages(tmp_path):
    lstm = trained(
        hyperize(nn.LSTM(256, 512, num_layers=2), tile=(4, 8), embedding_dim=1, hidden_dim=1)
    )
    result = report(lstm)
    total = result.snapshot.total
    assert total > 100_000
    text = html_of(result, tmp_path)
    drawn = int(re.search(rf"an even sample of ([\d,]+) of {total:,}", text)[1].replace(",", ""))
    assert 0.9 * DOTS < drawn <= DOTS
    assert len(text) < 150_000
    many = nn.Sequential(*(nn.Conv2d(16, 16, 3, bias=False) for _ in range(800)))
    assert len(html_of(report(trained(hyperize(many, compression=8))), tmp_path)) < 900_000


def test_an_interrupted_write_leaves_the_older_page(tmp_path, monkeypatch):
    result = case("plan")
    old = html_of(result, tmp_path)

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(FileError, match="no space"):
        case("tiles").to_html(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == old


def test_a_page_is_not_written_under_another_kinds_name(tmp_path):
    with pytest.raises(FileError, match=r"must end in \.html"):
        case("plan").to_html(tmp_path / "page.png")
    with pytest.raises(FileError, match="is not a folder"):
        case("plan").to_html(tmp_path / "absent" / "page.html")
    assert list(tmp_path.iterdir()) == []


# --- What a report holds on to ------------------------------------------------------------------


def test_figures_know_nothing_of_the_pictures():
    model = Stage()
    result = report(trained(hyperize(model, compression=4)))
    plan = report(make_plan(model, compression=4))
    assert result.snapshot.reason == ""
    assert result == plan
    assert hash(result) == hash(plan)
    assert repr(result) == repr(plan)
    facts = json.loads(plan.to_json())
    assert json.loads(result.to_json()) == facts
    assert "snapshot" not in facts


def pickled(result):
    return pickle.loads(pickle.dumps(result))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_copies_have_everything(again, tmp_path):
    result = report(trained(hyperize(Stage(), compression=4)))
    page = html_of(result, tmp_path)
    copied = again(result)
    assert copied == result
    assert str(copied) == str(result)
    assert html_of(copied, tmp_path) == page


def test_the_model_can_go(tmp_path):
    hyper = trained(hyperize(Stage(), compression=4, embeddings="tile"))
    result = report(hyper)
    gone = weakref.ref(hyper), weakref.ref(hyper.conv1), weakref.ref(hyper.hypernet)
    del hyper
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert html_of(result, tmp_path).count('alt="generated, ') == 3


def test_pictures_are_of_when_the_report_was_made(tmp_path):
    hyper = trained(hyperize(Stage(), compression=4))
    state = torch.get_rng_state()
    result = report(hyper)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in hyper.parameters())
    before = html_of(result, tmp_path)
    with torch.no_grad():
        hyper.conv1.weight_embedding.mul_(-1)
    assert html_of(result, tmp_path) == before
    assert html_of(report(hyper), tmp_path) != before
    to_dense(hyper, inplace=True)
    assert html_of(result, tmp_path) == before


# --- With a teacher, and over time --------------------------------------------------------------


def test_errors_are_those_of_the_fit(tmp_path):
    teacher = Stage()
    hyper = hyperize(teacher, compression=4)
    fit = fit_(hyper, teacher, sweeps=3)
    result = report(hyper, teacher=teacher.state_dict())
    assert [row.error for row in result.sites] == pytest.approx(
        [site.error for site in fit.sites], rel=1e-4
    )
    assert result.error == pytest.approx(fit.error, rel=1e-4)
    assert f"error: {result.error:.3f}" in str(result)
    assert report(hyper).error is None


def test_a_teacher_is_drawn_beside_with_the_difference(tmp_path):
    result = case("fitted")
    page = html_of(result, tmp_path)
    assert page.count('alt="teacher, ') == page.count('alt="difference, ') == 3
    for kernels in result.snapshot.kernels:
        peak = peak_of(kernels.wanted)
        for values in (kernels.wanted, kernels.values, kernels.values - kernels.wanted):
            data = base64.b64encode(picture(values, peak)[0]).decode()
            assert data in page


def test_teachers_that_do_not_fit_are_refused():
    hyper = hyperize(Stage(), compression=4)
    with pytest.raises(ModelError, match="that was hyperized"):
        report(hyper, teacher=nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no weights to compare"):
        report(make_plan(Stage()), teacher=Stage())
    two = hyperize(Stage(), compression=4, conditions=2)
    with pytest.raises(ModelError, match="a list of 2 teachers"):
        report(two, teacher=Stage())


def test_several_networks_have_an_error_over_all():
    teachers = [Stage(), Stage()]
    hyper = hyperize(teachers[0], compression=4, conditions=2)
    fit_(hyper, teachers, sweeps=2)
    result = report(hyper, teacher=teachers)
    missed = whole = 0.0
    name = name_of(result.sites[0], result)
    for k, teacher in enumerate(teachers):
        dense = to_dense(hyper, condition=k).get_parameter(name)
        wanted = teacher.get_parameter(name).detach()
        missed += float((dense.detach() - wanted).square().sum())
        whole += float(wanted.square().sum())
    assert result.sites[0].error == pytest.approx((missed / whole) ** 0.5, rel=1e-4)


def test_several_reports_on_one_page(show):
    teacher = Stage()
    hyper = hyperize(teacher, compression=4)
    reports = [report(hyper, teacher=teacher)]
    for seed in range(8):
        torch.manual_seed(seed)
        with torch.no_grad():
            for param in hyper.parameters():
                param += 0.05 * torch.randn_like(param)
        reports.append(report(hyper, teacher=teacher))
    page = show(reports)
    rows = page.locator("#times tbody tr").all()
    assert len(rows) == 6  # an even choice, the first and the last among them
    assert rows[0].locator("th").inner_text() == "report 0"
    last = rows[-1].locator("td").all_inner_texts()
    assert last[2] == f"{reports[-1].error:.3f}"
    moved = [float(row.locator("td").nth(1).inner_text()) for row in rows[1:]]
    assert moved[0] == 0 < moved[1] < moved[-1]
    assert "No pictures of report 0: the model is untrained" in page.inner_text("main")
    assert page.locator("svg.plane").count() == 5
    labels = page.locator(".kernels figure").first.locator(".row > div").all_inner_texts()
    assert labels[0] == "teacher"
    assert labels[-2:] == ["report 8", "difference"]


def test_reports_of_other_models_are_not_mixed(tmp_path):
    with pytest.raises(ConfigError, match="one model"):
        to_html([case("tiles"), case("fitted")], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="at least one"):
        to_html([], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


# --- What the pictures show ---------------------------------------------------------------------


def test_projection_is_the_principal_components():
    torch.manual_seed(1)
    hyper = trained(hyperize(CRNN(), compression=4))
    sources = sources_of(hyper)
    (seen,) = project([report(hyper).snapshot])
    z = torch.cat([source.embedding for source in sources]).double()
    z = z - z.mean(0)
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    plane = u[:, :2] * s[:2]  # (points, 2)
    points = torch.cat([torch.as_tensor(points) for _, points in seen.layers])
    far = min(plane.abs().max(), 4 * plane.square().mean().sqrt())
    torch.testing.assert_close(points.abs(), (plane / far).abs().clamp(max=1))
    assert seen.explained == pytest.approx((s[:2] ** 2 / (s**2).sum()).tolist())
    assert [name for name, _ in seen.layers] == [source.name for source in sources]
    assert [len(part) for _, part in seen.layers] == [len(s.embedding) for s in sources]
    assert (seen.drawn, seen.total, seen.unit) == (len(z), len(z), "tile")


def test_several_moments_share_a_plane():
    hyper = trained(hyperize(CRNN(), compression=4))
    one = report(hyper).snapshot
    first, second = project([one, one])
    for (_, a), (_, b) in zip(first.layers, second.layers, strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("options", [{}, {"embeddings": "channel"}, {"embeddings": "separable"}])
def test_equal_embeddings_have_equal_colours(options):
    """Of a weight the lower half is generated from the embeddings of the upper half."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    hyper = trained(hyperize(model, compression=3, **options))
    source = sources_of(hyper)[-1]
    embeddings = options.get("embeddings")
    family = source.layer.hypernet.family
    # Of channels, those of the rows; of separable weights, those of the numbers
    half = (32 if embeddings == "channel" else family.split(source.grid)[0]) // 2
    with torch.no_grad():
        embedding = source.layer._parameters[source.param]
        embedding[half : 2 * half] = embedding[:half]
    seen, *_ = (m for m in snapshot(sources_of(hyper), {}).maps if m.name == source.name)
    assert seen.colours.shape == (PLACES, PLACES, 3) == (*source.shape[:2], 3)
    np.testing.assert_array_equal(seen.colours[:16], seen.colours[16:])
    assert len(np.unique(seen.colours[:16].reshape(-1, 3), axis=0)) > 4
    assert 0 <= seen.colours.min() < seen.colours.max() <= SHADES - 1
    image = np.asarray(Image.open(io.BytesIO(map_picture(seen.colours))).convert("RGB"))
    np.testing.assert_array_equal(image, (30 + seen.colours * 42).astype(np.uint8))


def test_what_is_not_finite_is_left_out(tmp_path):
    hyper = trained(hyperize(Stage(), compression=4))
    with torch.no_grad():
        hyper.conv1.weight_embedding[0] = float("nan")
    result = report(hyper)
    (seen,) = project([result.snapshot])
    assert seen.drawn == seen.total - 1
    assert "not finite" in html_of(result, tmp_path)
    with torch.no_grad():
        for source in sources_of(hyper):
            source.embedding.fill_(float("inf"))
    assert "Fewer than two of them are finite" in html_of(report(hyper), tmp_path)


def test_equal_embeddings_and_zero_weights(tmp_path):
    model = Stage()
    nn.init.zeros_(model.conv1.weight)
    hyper = trained(hyperize(model, compression=4))
    with torch.no_grad():
        for source in sources_of(hyper):
            source.embedding.zero_()
    assert "nan" not in html_of(report(hyper), tmp_path)


SHAPES = {
    (32, 16, 3, 3): (8, 8),
    (32, 3, 5, 5): (8, 6),
    (40, 1, 3, 3): (5, 8),  # depthwise: there is one kernel per output
    (2, 64, 3, 3): (2, 8),
    (64, 32, 7): (8, 8),
    (16, 16, 2, 3, 3): (8, 8),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_in_the_picture_are_the_weights(shape):
    outputs, inputs, *kernel = shape
    groups = outputs if inputs == 1 else 1
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    model = nn.Sequential(conv(inputs * groups, outputs, kernel, groups=groups))
    targets = ("conv1d", "conv2d", "conv3d")
    hyper = hyperize(model, targets=targets[len(kernel) - 1], tile=(1, 1), embedding_dim=1)
    (source,) = sources_of(trained(hyper))
    (seen,) = report(hyper).snapshot.kernels
    rows, columns = SHAPES[shape]
    per = min(inputs, 8)
    kernels = torch.stack([source.weight()[at // per, at % per] for at in range(rows * columns)])
    kernels = kernels.reshape(rows * columns, -1, shape[-1])  # (kernels, height, width)
    _, height, width = kernels.shape
    assert f"{rows * columns} of {outputs * inputs:,} kernels" in seen.caption
    peak = float(2 * kernels.square().mean().sqrt())
    assert peak_of(seen.values) == pytest.approx(peak)
    png, size = picture(seen.values, peak)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    zoom = min(240 // (columns * width), 480 // (rows * height))
    rule = 1 + zoom // 4
    pitch = width * zoom + rule, height * zoom + rule
    assert image.size == size == (columns * pitch[0] - rule, rows * pitch[1] - rule)
    for at, y, x in itertools.product(*map(range, kernels.shape)):
        value = float(kernels[at, y, x])
        corner = at % columns * pitch[0] + x * zoom, at // columns * pitch[1] + y * zoom
        red, _, blue, alpha = image.getpixel(corner)
        assert alpha == pytest.approx(254 * min(abs(value) / peak, 1), abs=2)
        assert (red > blue) == (value > 0) or alpha < 3


def test_matrix_in_the_picture_is_the_weights_corner():
    hyper = trained(hyperize(CRNN(), compression=4))
    source, seen = sources_of(hyper)[2], report(hyper).snapshot.kernels[2]
    assert "the first 96 rows and 32 columns" in seen.caption
    peak = 2 * source.weight().square().mean().sqrt()
    image = Image.open(io.BytesIO(picture(seen.values, float(peak))[0])).convert("RGBA")
    assert image.size == (5 * 32, 5 * 96)
    alpha = torch.tensor(np.asarray(image.getchannel("A")))[::5, ::5]
    expected = 254 * (source.weight().abs() / peak).clamp(max=1)
    torch.testing.assert_close(alpha.float(), expected, atol=2, rtol=0)


def test_spread():
    assert spread(range(10), 3) == [0, 4, 9]
    assert spread(range(2), 3) == [0, 1]
    assert spread(range(5), 1) == [0]
    assert spread(range(5), 0) == spread([], 3) == []


# --- The chart ----------------------------------------------------------------------------------


def test_chart_has_every_figure(result):
    figure = result.plot()
    assert type(figure) is Figure
    above, below = figure.axes
    dense, hyper = ([bar.get_width() for bar in group] for group in below.containers)
    assert dense == [row.dense_params for row in result.sites] + [0]
    assert hyper == [row.hyper_params for row in result.sites] + [result.hypernet_params]
    pairs = zip(*([bar.get_width() for bar in group] for group in above.containers), strict=True)
    ratios = (result.compression, result.total_compression, result.dense_bytes / result.hyper_bytes)
    assert [dense / hyper for dense, hyper in pairs] == pytest.approx(ratios)
    texts = " ".join(text.get_text() for text in above.texts)
    assert f"{result.total_dense_params:,} → {result.total_hyper_params:,}" in texts
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    image = Image.open(file)
    assert image.size[0] == 450
    assert image.size[1] < 1600


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_charts_are_written(tmp_path, suffix):
    path = tmp_path / f"chart.{suffix}"
    assert case("tiles").plot(str(path)) == path
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_charts_of_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"take one of .*\.png"):
        case("tiles").plot(tmp_path / "chart.docx")
    with pytest.raises(FileError, match="cannot be written"):
        case("tiles").plot(tmp_path / "absent" / "chart.png")
    assert list(tmp_path.iterdir()) == []


def test_charts_leave_nothing_behind():
    from matplotlib import pyplot

    case("plan").plot()
    assert pyplot.get_fignums() == []


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hyperize[plot]'")):
        case("plan").plot()


def test_timm_model_end_to_end(tmp_path):
    result = report(trained(hyperize(timm.create_model("resnet18"), compression=10)))
    assert 20_000 < len(html_of(result, tmp_path)) < 100_000
