"""The report in a real browser: complete, self-contained, readable in both themes, on a phone and on paper."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import study_kit

WIDE = "document.documentElement.scrollWidth > window.innerWidth"
# Elements whose text is cut off: wider inside than they are, unless they scroll by themselves.
CUT = """[...document.querySelectorAll('h1, h2, h3, p, li, td, th, figcaption, summary, pre, .chip')]
  .filter(e => e.getClientRects().length && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline'
    && !e.closest('.scroll')).map(e => e.textContent.trim().slice(0, 60))"""
# The lowest contrast (WCAG) between a text and what lies behind it.
CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
    return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  let least = 99;
  for (const e of document.querySelectorAll('h1, h2, h3, p, li, td, th, .chip, figcaption, summary, pre, code')) {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    least = Math.min(least, (a + .05) / (b + .05));
  } return least; })()"""
# The smallest letters of a picture, in pixels of the screen: the height of a digit of the axes times its scale.
SMALLEST = """Math.min(...[...document.querySelectorAll('figure svg')].map(s =>
  9.5 * s.getBoundingClientRect().width / s.viewBox.baseVal.width))"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the study, with names that try to break out of the page."""
    from tools.analysis import report

    folder = tmp_path_factory.mktemp("report")
    shelf = study_kit.write_study(folder / "logs", interleaved=True)
    evil = "<script>document.title='pwned'</script>\"'><img src=http://example.org/x>{{7*7}}</svg>"
    config = {"experiment_name": evil, "stage": "C_full", "modification_details": "<b>twice</b>"}
    study_kit.write_experiment(shelf, "evil", [3.2801, 3.2803, 3.2799], failed=(1,), config=config)
    out = folder / "report.html"
    note = "--note=No <i>GPU</i> was used."
    report.main([str(shelf), f"--out={out}", "--title=Study <b>C</b> & more", note])
    return out


class Seen(HTMLParser):
    """Tags, attributes and open elements of a page."""

    VOID = ("meta", "link", "br", "img", "hr", "input", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name.endswith(("href", "src", "action"))]
        assert not [name for name, _ in attrs if name.startswith("on")], attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing(page_file: Path) -> None:
    text = page_file.read_text()
    seen = Seen()
    seen.feed(text)
    assert not seen.open and "script" not in seen.tags and "img" not in seen.tags and "link" not in seen.tags
    assert len(seen.ids) == len(set(seen.ids))  # else one picture would show another's letters
    assert seen.addresses and all(address.startswith("#") for address in seen.addresses)
    assert "url(http" not in text and "@import" not in text and "49" not in re.findall(r"x&gt;(\d+)", text)
    assert "default-src 'none'" in text and seen.tags.count("svg") == 6


def test_the_page_says_what_the_study_says(page_file: Path) -> None:
    text = re.sub(r"<svg.*?</svg>", "", page_file.read_text(), flags=re.DOTALL).replace("<wbr>", "")
    for words in (
        "Study &lt;b&gt;C&lt;/b&gt; &amp; more", "It helped", "It hurt", "No evidence either way", "paired, 5 pairs",
        "run 4 (seed 46): exit status 70: the loss was not finite", "8 x NVIDIA H100 80GB HBM3", "3.2763",
        "engaging report", "&lt;script&gt;document.title=",
    ):  # fmt: skip
        assert words in text, words


def test_holms_p_stands_beside_the_raw_one_where_several_were_tested(page_file: Path, tmp_path: Path) -> None:
    from tools.analysis import report

    several = page_file.read_text()
    rows = re.findall(r'data-label="p, Holm"><span>([^<]+)<br>([^<]+)</span>', several)
    assert "p (gain)<br>Holm</th>" in several and len(rows) > 3
    tested = [(float(p.lstrip("&lt;")), float(holm.lstrip("&lt;"))) for p, holm in rows if p != "-"]
    assert len(tested) > 2 and all(holm >= p for p, holm in tested) and any(holm > p for p, holm in tested)
    for name, losses in (("baseline", [3.28, 3.29]), ("idea", [3.27, 3.26])):
        study_kit.write_experiment(tmp_path, name, losses)
    report.main([str(tmp_path), f"--out={tmp_path / 'one.html'}"])
    assert "Holm" not in (tmp_path / "one.html").read_text()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_on_a_screen(browser, page_file: Path, width: int, dark: bool) -> None:
    page = browser.open(page_file, width=width, dark=dark)
    assert page.complaints == [] and page.requests == [page_file.resolve().as_uri()]
    assert page.evaluate("document.title") == "Study <b>C</b> & more"
    assert page.evaluate(WIDE) is False
    assert page.evaluate(CUT) == []
    assert page.evaluate(CONTRAST) >= 4.5
    assert page.evaluate(SMALLEST) >= (7 if width < 390 else 9)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('figure svg')).color")
    assert (background, ink) == (
        ("rgb(15, 20, 25)", "rgb(227, 232, 238)") if dark else ("rgb(255, 255, 255)", "rgb(31, 35, 40)")
    )
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(boxes) == 6 and min(boxes) > 100
    page.close()


def test_the_pictures_are_drawn(browser, page_file: Path) -> None:
    import io

    import matplotlib.image

    page = browser.open(page_file)
    pixels = matplotlib.image.imread(io.BytesIO(page.screenshot()))
    box = page.evaluate("(r => [r.x, r.y + scrollY, r.width, r.height])(document.querySelector('figure svg')"
                        ".getBoundingClientRect())")  # fmt: skip
    left, top, width, height = (round(value) for value in box)
    colours = (pixels[top : top + height, left : left + width, :3] * 255).round().astype(int)
    for wanted in ((107, 114, 128), (0, 114, 178), (213, 94, 0)):  # the baseline's grey, blue, vermilion
        assert abs(colours - wanted).sum(axis=2).min() < 12, wanted
    page.close()


def test_on_paper(browser, page_file: Path) -> None:
    page = browser.open(page_file, dark=True)  # paper is white whatever the reader's theme
    data = page.pdf()
    assert data.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 12
    page.call("Emulation.setEmulatedMedia", media="print",
              features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    page.call("Emulation.setDeviceMetricsOverride", width=680, height=960, deviceScaleFactor=1, mobile=False)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('figure svg')).color") == "rgb(0, 0, 0)"
    assert page.evaluate(WIDE) is False and page.evaluate(CONTRAST) >= 4.5
    page.close()


def test_where_the_page_goes(engaging: Callable, tmp_path: Path) -> None:
    folder = study_kit.write_experiment(tmp_path, "baseline", [3.28, 3.29])
    done = engaging("report", folder)
    assert (done.status, done.out) == (0, f"written: {folder / 'report.html'}\n")
    first = (folder / "report.html").read_text()
    assert engaging("report", folder, "--title=Again").status == 0  # replaced, not added to
    second = (folder / "report.html").read_text()
    assert "<title>Again</title>" in second and f"<title>{folder.name}</title>" in first


def test_a_page_of_many_variants_stays_small(tmp_path: Path) -> None:
    from tools.analysis import analyze, report
    from tools.analysis.load import load

    for number in range(60):
        name = f"variant_{number:02}" if number else "baseline"
        study_kit.write_experiment(tmp_path, name, [3.28 + number / 1e4, 3.29], steps=50)
    found = analyze.analyze(load([tmp_path]))
    page = report.page(found, "many", "engaging report", "today")
    assert len(page) < 1_500_000 and page.count("<details") == 60
    assert "of 60 variants, those of the highest loss, are not drawn" in page


def test_a_page_to_send_around_names_no_folder_of_this_machine(page_file: Path) -> None:
    text = page_file.read_text()
    assert "engaging report logs --out=report.html &#39;--title=" in text
    assert str(page_file.parent) not in text and "--note" not in text  # the notes stand above
    assert "<p>No &lt;i&gt;GPU&lt;/i&gt; was used.</p>" in text.partition("<main>")[0]
    assert (
        '<p class="soft">&lt;b&gt;twice&lt;/b&gt;</p>' in text
    )  # what its configuration says that it changes


def test_the_record_history_is_named_where_it_is_drawn(page_file: Path, tmp_path: Path) -> None:
    from tools.analysis import report

    study_kit.write_experiment(tmp_path, "far", [1.5, 1.6])
    report.main([str(tmp_path), f"--out={tmp_path / 'far.html'}"])
    assert "The record history is from" in page_file.read_text()
    assert "record history" not in (tmp_path / "far.html").read_text()
