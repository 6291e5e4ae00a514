"""The report to look at: the page in a real browser and by the letter, and the chart."""

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

from hyperize import FileError, hyperize, make_plan, report, to_dense
from hyperize.drawing import DOTS, picture, project, spread

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update", "--disable-sync"]
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}
HOSTILE = ("<script>alert(1)</script>", '"onload="alert(2)', "a&lt;b</td>", "it's", "$x^2$" * 40)
VOID = {"meta", "link", "img", "br", "wbr"}


def hostile():
    model = nn.Sequential(nn.Conv2d(32, 32, 3))
    for name in HOSTILE:
        model.add_module(name, nn.Conv2d(32, 32, 3))
    model.add_module("<i>small</i>", nn.Conv2d(1, 2, 1))
    return model


CASES = {
    "tiles": lambda: report(hyperize(CRNN(), compression=4)),
    "channels": lambda: report(hyperize(Convolutions(64), compression=3, embeddings="channel")),
    "dynamic": lambda: report(hyperize(CRNN(), compression=2, lstm="dynamic")),
    "plan": lambda: report(make_plan(meta("resnet152"))),
    "hostile": lambda: report(hyperize(hostile(), compression=4)),
}


@functools.cache
def case(name):
    return CASES[name]()


@pytest.fixture(params=CASES)
def result(request):
    return case(request.param)


def html_of(result, tmp_path):
    result.to_html(tmp_path / "page.html")
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
        result.to_html(file)
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
            [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent))"""
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
        ]
        for at, row in enumerate(result.sites, 1)
    ]
    shared, total = rows_of(page, "tfoot")
    assert shared[5] == str(result.hypernet_params)
    assert total[4:6] == [str(result.dense_params), str(result.hyper_params)]
    assert float(total[6]) == result.compression
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


def test_bars_are_as_long_as_the_figures_say(show, result):
    page = show(result)
    bars = page.evaluate(
        """[...document.querySelectorAll(".bars li")].map((line) => [
            line.children[0].textContent, line.children[1].textContent,
            ...["dense", "hyper"].map((side) =>
                line.querySelector(`rect.${side}`)?.getBoundingClientRect().width ?? 0)])"""
    )
    expected = [(name_of(r, result), r.dense_params, r.hyper_params) for r in result.sites]
    expected.append(("hypernet (shared)", 0, result.hypernet_params))
    full = page.evaluate("document.querySelector('.bars svg').getBoundingClientRect().width")
    largest = max(max(dense, hyper) for _, dense, hyper in expected)
    for (name, figures, *widths), (path, *sizes) in zip(bars, expected, strict=True):
        assert name == path
        assert figures == f"{sizes[0]:,} → {sizes[1]:,}"
        for width, size in zip(widths, sizes, strict=True):
            assert width == pytest.approx(full * (size / largest) ** 0.5, abs=0.01 * full)


def test_headings_sort_by_mouse_and_by_keyboard(show):
    result = case("tiles")
    page = show(result)
    before = rows_of(page)

    def state():
        return page.evaluate(
            "[...document.querySelectorAll('#weights thead th')].map((h) => h.ariaSort)"
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
            .filter((e) => !e.closest("table, path, rect, line"))
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
        "[...document.images].map((i) => [i.complete, i.naturalWidth, i.clientWidth, i.alt])"
    )
    names = ["trunk.0.weight", "trunk.4.weight", "lstm.weight_ih_l0"]
    assert [alt.rpartition(" ")[2] for *_, alt in sizes] == names
    assert all(done and width > 100 and shown > 100 for done, width, shown, _ in sizes)
    box = page.locator("svg.plane").bounding_box()
    assert min(box["width"], box["height"]) > 300
    assert page.locator("svg.plane path").count() == len(result.sites)
    assert f"all {sum(len(s.embedding) for s in result.sources)}" in page.inner_text("figcaption")


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


def test_without_scripts_only_sorting_is_missing(show):
    result = case("tiles")
    page = show(result, java_script_enabled=False)
    assert page.locator("#weights tbody tr").count() == len(result.sites)
    assert page.locator("button").count() == 0
    assert page.locator("img").count() == 3


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
    names = Outline(text).data["th"]
    assert {f"{name}.weight" for name in HOSTILE} <= set(names)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: report(make_plan(Stage())), "report of a plan"),
        (lambda: copy.copy(report(hyperize(Stage()))), "a copy of a report"),
        (lambda: report(hyperize(meta("resnet18"))), "on the meta device"),
        (lambda: report(hyperize(nn.LSTM(8, 8), lstm="dynamic")), "generated from embeddings"),
    ],
    ids=["plan", "copy", "meta", "dynamic"],
)
def test_without_values_the_page_says_why(make, reason, tmp_path):
    text = html_of(make(), tmp_path)
    assert text.count("<img") == text.count("svg class=plane") == 0
    (line,) = re.findall('<p class="soft" id="no-pictures">(.*)</p>', text)
    assert reason in line


def test_a_model_made_dense_since_has_no_pictures(tmp_path):
    hyper = hyperize(Stage())
    result = report(hyper)
    to_dense(hyper, inplace=True)
    assert "has been converted to a dense one" in html_of(result, tmp_path)


def test_large_models_give_small_pages(tmp_path):
    lstm = hyperize(nn.LSTM(256, 512, num_layers=2), tile=(4, 8), embedding_dim=1, hidden_dim=1)
    result = report(lstm)
    total = sum(len(source.embedding) for source in result.sources)
    assert total > 100_000
    text = html_of(result, tmp_path)
    drawn = int(re.search(rf"an even sample of ([\d,]+) of {total:,}", text)[1].replace(",", ""))
    assert 0.9 * DOTS < drawn <= DOTS
    assert len(text) < 150_000
    many = nn.Sequential(*(nn.Conv2d(16, 16, 3, bias=False) for _ in range(800)))
    assert len(html_of(report(hyperize(many, compression=8)), tmp_path)) < 800_000


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


# --- What a report holds on to ------------------------------------------------------------------


def test_figures_know_nothing_of_the_pictures():
    model = Stage()
    result = report(hyperize(model, compression=4))
    plan = report(make_plan(model, compression=4))
    assert result.sources
    assert result == plan
    assert hash(result) == hash(plan)
    assert repr(result) == repr(plan)
    assert json.loads(result.to_json()) == json.loads(plan.to_json())
    assert "sources" not in result.to_dict()


def pickled(result):
    data = pickle.dumps(result)
    assert len(data) < 2_000
    return pickle.loads(data)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_copies_have_the_figures(again):
    result = report(hyperize(Stage(), compression=4))
    copied = again(result)
    assert copied == result
    assert str(copied) == str(result)
    assert copied.sources == ()


def test_the_rest_of_the_model_can_go(tmp_path):
    hyper = hyperize(Stage(), compression=4)
    result = report(hyper)
    gone = weakref.ref(hyper), weakref.ref(hyper.head), weakref.ref(hyper.norm)
    del hyper
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert html_of(result, tmp_path).count("<img") == 3


def test_pictures_are_of_now(tmp_path):
    hyper = hyperize(Stage(), compression=4)
    result = report(hyper)
    before = html_of(result, tmp_path)
    assert html_of(result, tmp_path) == before
    state = torch.get_rng_state()
    with torch.no_grad():
        hyper.conv1.weight_embedding.mul_(-1)
    assert html_of(result, tmp_path) != before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in hyper.parameters())


# --- What the pictures show ---------------------------------------------------------------------


def test_projection_is_the_principal_components():
    torch.manual_seed(1)
    result = report(hyperize(CRNN(), compression=4))
    seen = project(result.sources)
    z = torch.cat([source.embedding for source in result.sources]).double()
    z = z - z.mean(0)
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    plane = u[:, :2] * s[:2]  # (points, 2)
    points = torch.cat([torch.as_tensor(points) for _, points in seen.layers])
    torch.testing.assert_close(points.abs(), (plane / plane.abs().max()).abs())
    assert seen.explained == pytest.approx((s[:2] ** 2 / (s**2).sum()).tolist())
    assert [name for name, _ in seen.layers] == [source.name for source in result.sources]
    assert [len(part) for _, part in seen.layers] == [len(s.embedding) for s in result.sources]
    assert (seen.drawn, seen.total, seen.unit) == (len(z), len(z), "tile")


def test_what_is_not_finite_is_left_out(tmp_path):
    hyper = hyperize(Stage(), compression=4)
    result = report(hyper)
    with torch.no_grad():
        hyper.conv1.weight_embedding[0] = float("nan")
    seen = project(result.sources)
    assert seen.drawn == seen.total - 1
    assert "not finite" in html_of(result, tmp_path)
    with torch.no_grad():
        for source in result.sources:
            source.embedding.fill_(float("inf"))
    assert "Fewer than two of them are finite" in html_of(result, tmp_path)


def test_equal_embeddings_and_zero_weights(tmp_path):
    model = Stage()
    nn.init.zeros_(model.conv1.weight)
    result = report(hyperize(model, compression=4))
    with torch.no_grad():
        for source in result.sources:
            source.embedding.zero_()
    assert "nan" not in html_of(result, tmp_path)


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
    (source,) = report(
        hyperize(model, targets=targets[len(kernel) - 1], tile=(1, 1), embedding_dim=1)
    ).sources
    seen = picture(source)
    rows, columns = SHAPES[shape]
    per = min(inputs, 8)
    kernels = torch.stack([source.weight()[at // per, at % per] for at in range(rows * columns)])
    kernels = kernels.reshape(rows * columns, -1, shape[-1])  # (kernels, height, width)
    _, height, width = kernels.shape
    assert f"{rows * columns} of {outputs * inputs:,} kernels" in seen.caption
    image = Image.open(io.BytesIO(seen.png)).convert("RGBA")
    zoom = min(240 // (columns * width), 480 // (rows * height))
    rule = 1 + zoom // 4
    pitch = width * zoom + rule, height * zoom + rule
    assert image.size == seen.size == (columns * pitch[0] - rule, rows * pitch[1] - rule)
    peak = float(2 * kernels.square().mean().sqrt())
    for at, y, x in itertools.product(*map(range, kernels.shape)):
        value = float(kernels[at, y, x])
        corner = at % columns * pitch[0] + x * zoom, at // columns * pitch[1] + y * zoom
        red, _, blue, alpha = image.getpixel(corner)
        assert alpha == pytest.approx(254 * min(abs(value) / peak, 1), abs=2)
        assert (red > blue) == (value > 0) or alpha < 3


def test_matrix_in_the_picture_is_the_weights_corner():
    source = case("tiles").sources[2]
    seen = picture(source)
    assert "the first 96 rows and 32 columns" in seen.caption
    image = Image.open(io.BytesIO(seen.png)).convert("RGBA")
    assert image.size == (5 * 32, 5 * 96)
    peak = 2 * source.weight().square().mean().sqrt()
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


def test_charts_leave_nothing_behind():
    from matplotlib import pyplot

    case("plan").plot()
    assert pyplot.get_fignums() == []


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hyperize[plot]'")):
        case("plan").plot()


def test_timm_model_end_to_end(tmp_path):
    result = report(hyperize(timm.create_model("resnet18"), compression=10))
    assert 20_000 < len(html_of(result, tmp_path)) < 100_000
