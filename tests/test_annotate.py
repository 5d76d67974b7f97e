"""The annotated pages: every equation linked both ways, no dead link, valid HTML, calls unfolded, and, where Chromium
is, no page wider than its window."""
import html.parser
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

for package in ("pygments", "markdown_it", "latex2mathml"):
    pytest.importorskip(package)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

annotate, side_by_side, sources = map(importlib.import_module, ("annotate", "side_by_side", "sources"))
REQUIRED = {"detreg": [2, 3, 4], "updetr": [1, 2, 3], "siamese_detr": [*range(4, 14), 18], "soco": range(1, 7),
            "dupr": [*range(1, 7), 8, 9]}
UNFOLDED = {
    "detreg": ["detreg.embedding_loss", "detreg.DETReg.forward", "common.SetCriterion.losses", "common.normalizer",
               "common.HungarianMatcher.__call__", "common.DeformableDETR.detect", "common.MSDeformAttn.forward"],
    "updetr": ["updetr.group_mask", "common.DETR.detect", "common.DETRDecoderLayer.forward",
               "common.SetCriterion.forward"],
    "siamese_detr": ["siamese_detr.global_loss", "siamese_detr.SiameseDETR.region_features",
                     "common.ConditionalDecoderLayer.forward", "common.DETREncoderLayer.forward"],
    "soco": ["soco.pair_loss", "soco.SoCo.embed", "soco.FPN.forward", "soco.LARS.step", "common.update_average"],
    "dupr": ["dupr.info_nce", "dupr.Encoder.forward", "dupr.Queue.enqueue", "dupr.mirror_patches"],
}
VOID = {"meta", "link", "img", "br", "hr"}
BLOCKS = {"div", "pre", "table", "ul", "ol", "dl", "p", "section", "details", "h1", "h2", "h3", "main", "nav"}


class Checker(html.parser.HTMLParser):
    """ids, links (with the id they stand in) and text of a page; asserts that tags are closed in order, ids are unique
    and no block lies in a paragraph, a span, a pre or a link."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.ids, self.links, self.text = [], {}, [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        assert len(named) == len(attributes), f"an attribute twice: {attributes}"
        assert tag not in BLOCKS or not {"p", "span", "pre", "a", "summary"} & {t for t, _ in self.stack}, self.stack
        assert tag != "a" or "a" not in {t for t, _ in self.stack}, f"a link in a link: {named}"
        if "id" in named:
            assert named["id"] and named["id"] not in self.ids and " " not in named["id"], named["id"]
            self.ids[named["id"]] = self.getpos()[0]
        for key in {"href", "src"} & set(named):
            self.links.append((named[key], [i for _, i in self.stack if i]))
        if tag not in VOID:
            self.stack.append((tag, named.get("id")))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop()[0] == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, {name: page}) with a run of DETReg's demo."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("site")
    run = runs / "detreg-demo"
    run.mkdir()
    rows = {"steps": 300, "primary": "AR100", "untrained": {"AP": 0.0, "AR100": 0.0281, "APl": None},
            "pretrained": {"AP": 0.0649, "AR100": 0.3164, "APl": None}}
    (run / "metrics.json").write_text(json.dumps(rows))
    (run / "curves.png").write_bytes((ROOT / "docs" / "own-curves.png").read_bytes())
    annotate.main(["--out", str(out), "--runs", str(runs)])
    return out, {path.stem: Checker(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.html"))}


@pytest.fixture(scope="module")
def modules():
    return sources.Sources()


def test_pages(built):
    out, pages = built
    assert set(pages) == {"index", "compare", *sources.METHODS, *sources.SHARED}
    for name, page in pages.items():
        for link, _ in page.links:
            path, _, place = link.partition("#")
            assert (out / path).is_file() if path else True, f"{name}.html: {link}"
            assert not place or place in pages[path.removesuffix(".html") or name].ids, f"{name}.html: {link}"
        text = (out / f"{name}.html").read_text(encoding="utf-8")
        assert "<script" not in text and "http" not in re.sub(r'xmlns="[^"]+"', "", text).split("<h2")[0]
    banners = re.findall(r"# ==== (.+) ====", (ROOT / "detreg.py").read_text())
    assert len(banners) == 7 and all(banner in pages["detreg"].text for banner in banners)


@pytest.mark.parametrize("method", REQUIRED)
def test_every_equation_is_linked_both_ways(built, modules, method):
    out, pages = built
    equations = modules.equations[method]
    assert list(equations) == list(REQUIRED[method])
    for number, equation in equations.items():
        assert f"eq-{number}" in pages[method].ids and sum(map(len, equation.lines.values()))
        backward = {link for link, inside in pages[method].links if f"eq-{number}" in inside}
        for module, n in sum(equation.lines.values(), []):
            assert f"{module}.html#L{n}" in backward
            forward = [inside for link, inside in pages[module].links if link == f"{method}.html#eq-{number}"]
            assert any(f"L{n}" in inside for inside in forward), f"{module}.py, line {n}"
        for latex in (equation.latex, *re.findall(r"\$([^$]+)\$", equation.text)):
            assert "\\" not in annotate.mathml(latex), f"{method}, Eq. ({number}): {latex}"


def test_an_equation_that_went_stale(modules):
    equation = modules.equations["detreg"][4]
    assert modules.problem(equation) is None
    equation.names.append("z_tilde")
    assert modules.problem(equation) == "z_tilde: not in detreg.embedding_loss"
    equation.names.pop()
    lines, equation.lines = equation.lines, {"detreg.embedding_loss": []}
    assert modules.problem(equation) == "no tag in detreg.embedding_loss"
    equation.lines = lines


@pytest.mark.parametrize("text, module, expected", [
    ("# Eq. (6)-(8), (10)", "siamese_detr", [("siamese_detr", [6, 7, 8, 10])]),
    ("# UP-DETR, Eq. (2); Siamese DETR, Eq. (12)", "common", [("updetr", [2]), ("siamese_detr", [12])]),
    ("# Eq. (2) of DETReg", "common", [("detreg", [2])]), ("# Eq. (3) there", "common", []),
    ("# Eq. (9)", "figures", [("dupr", [9])]), ("# Eq. (3) and (4)", "dupr", [("dupr", [3, 4])])])
def test_whose_equation(text, module, expected):
    assert [(method, numbers) for _, method, numbers in sources.equations_in(text, module)] == expected


@pytest.mark.parametrize("method", UNFOLDED)
def test_a_training_step_unfolds(built, method):
    text = (built[0] / f"{method}.html").read_text(encoding="utf-8")
    summaries = re.findall(r"<summary>([\w.]+) ", text)
    assert not set(UNFOLDED[method]) - set(summaries)
    assert text.count("<details") == len(summaries)


def test_objects_exist(modules):
    for name in (*sources.OBJECTS.values(), *(v for of in sources.OBJECTS_OF.values() for v in of.values())):
        module, _, cls = name.partition(".")
        assert not name or cls in modules[module].defs


def test_deviations(built):
    out, pages = built
    for method in sources.METHODS:
        numbers = re.findall(r"(?m)^- \*\*(D\d+)\*\*", (ROOT / "docs" / "methods" / f"{method}.md").read_text())
        assert len(numbers) > 10 and set(numbers) <= set(pages[method].ids)
    text = (out / "detreg.html").read_text(encoding="utf-8")
    assert 'href="detreg.html#D2" title="f_emb. Paper: &quot;2 hidden layers&quot;. Released: one hidden' in text
    assert 'href="proposals.html#D4"' in (out / "siamese_detr.html").read_text(encoding="utf-8")


def test_what_the_papers_differ_in(built, modules):
    text = (built[0] / "compare.html").read_text(encoding="utf-8")
    row = re.search(r"<tr><td><code>batch_size</code>.*?</tr>", text)[0]
    assert re.findall(r"<code>(\d+)</code></a>", row) == ["192", "256", "256", "2048", "256"]
    assert "<td><code>max_prop</code></td>" in text and "<code>seed</code>" not in text
    for method in sources.METHODS:
        parts = side_by_side.step_parts(modules, method)
        assert all(parts.values()), f"{method}: a part of the training step is empty"
        assert "_loss(" in modules[method].lines[parts["Loss"][0] - 1]
    assert "<tr><th>a</th></tr><tr><td>1</td></tr>" in side_by_side.table(["a"], [["1"]])


def test_the_demo_at_the_end(built, tmp_path, capsys):
    out, pages = built
    text = "".join(pages["detreg"].text)
    assert "python detreg.py --preset demo" in text and "0.316" in text and "APl" not in text.rpartition("The demo")[2]
    assert (out / "detreg-curves.png").is_file() and not (out / "detreg-predictions.png").exists()
    assert "makes out/soco-demo" in "".join(pages["soco"].text)
    with pytest.raises(SystemExit) as stopped:
        annotate.main(["--out", str(tmp_path), "--runs", str(tmp_path / "none")])
    assert stopped.value.code == 2 and "there is no such folder" in capsys.readouterr().err


def test_the_workflow():
    """Tests by .ci/run with the oldest and the newest Python; pages after them, with the demos' numbers."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.10", "3.x"] and jobs["pages"]["needs"] == "test"
    assert [step["run"] for step in jobs["test"]["steps"] if "run" in step] == ["bash .ci/run"]
    assert "python docs/annotate.py --out site --runs out" in [step.get("run") for step in jobs["pages"]["steps"]]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("width, dark", [(390, True), (1280, False)])
def test_in_a_browser(built, tmp_path, width, dark):
    """Each page in a frame of this width: as wide as the frame, code of a readable size, colours of the scheme."""
    shape = f'width="{width}" height="800"'
    frames = "".join(f'<iframe id="{name}" src="{(built[0] / name).as_uri()}.html" {shape}></iframe>'
                     for name in ("index", "compare", "common", *sources.METHODS))
    (tmp_path / "all.html").write_text(f"""<body>{frames}<script>onload = () => {{
        const frames = [...document.querySelectorAll("iframe")];
        document.body.textContent = JSON.stringify(Object.fromEntries(frames.map(f => {{
            const d = f.contentDocument, style = e => f.contentWindow.getComputedStyle(e);
            for (const e of d.querySelectorAll("details")) e.open = true;
            return [f.id, [d.documentElement.scrollWidth, parseFloat(style(d.querySelector("pre") || d.body).fontSize),
                           parseInt(style(d.body).backgroundColor.slice(4))]];
        }})))}}</script>""")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
             f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={1 - dark}"]
    done = subprocess.run(["chromium", *flags, "--dump-dom", (tmp_path / "all.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    measured = json.loads(re.search(r"\{.*\}", done.stdout)[0])
    assert len(measured) == 3 + len(sources.METHODS)
    for name, (scroll_width, font, red) in measured.items():
        assert scroll_width <= width and font >= 11, (name, scroll_width, font)
        assert red < 60 if dark else red > 240, (name, red)
