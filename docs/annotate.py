"""Annotated pages: what a script says about itself beside its code, equations set, calls linked and unfolded.

    pip install -r docs/requirements.txt
    python docs/annotate.py --out site                 # with --runs out each page ends with its demo's numbers

Scripts are read as text (docs/sources.py), nothing of them is imported. Pages need neither a script nor the network.
"""
from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import textwrap
from pathlib import Path

import latex2mathml.converter
import side_by_side
from markdown_it import MarkdownIt
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Literal, Name
from side_by_side import escape, table
from sources import METHODS, SHARED, Equation, Source, Sources, equations_in

DEVIATION = re.compile(r"(?:\b(\w+)\.py, )?\bD(\d+)\b(?:\s+in\s+(\w+)\.py)?")
STYLES = {Comment: "c", Keyword: "k", Literal.String: "s", Literal.Number: "m", Name.Function: "f", Name.Class: "f"}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="stylesheet" href="annotate.css"></head>
<body><nav class="pages">{pages}</nav>
<main><h1>{title}</h1>{body}</main></body></html>
"""
INDEX = """<p class="lead">What a script says about itself on the left, its code on the right. An equation's tag leads
to the equation, a D-number to where paper, released code and this code differ, a name to its definition. In section 5
of a page the functions that a training step calls unfold where they are called.</p>
<h2>The methods</h2><ul>{methods}</ul><h2>Side by side</h2><ul><li><a href="compare.html">{compare}</a></li></ul>
<h2>What they stand on</h2><ul>{shared}</ul>
"""
PAGES = {"index": "Annotated pages", **METHODS, "compare": "What the papers differ in",
         **{name: f"{name}.py" for name in SHARED}}
MARKDOWN = MarkdownIt().enable("table")
HEADINGS = re.compile(r"(?m)^(Paper|Idea|Diagram|Run|Hyperparameters|Deviations|Expected)\b[^:\n]*:(?: |$)")


def mathml(latex: str, display: str = "inline") -> str:
    """MathML; \\mathbb{1} as a character, since browsers know no other way."""
    return re.sub(r'<mn mathvariant="double-struck">1</mn>', "<mn>\U0001d7d9</mn>",
                  latex2mathml.converter.convert(latex, display=display))


class Site:
    def __init__(self):
        self.sources = Sources()
        self.comments: dict[str, set[int]] = {name: set() for name in self.sources}  # lines that are nothing else
        self.code = {name: self.highlight(source) for name, source in self.sources.items()}

    # ---- Prose ----

    def refer(self, text: str, module: str) -> str:
        """Equations and D-numbers in escaped text without tags become links."""
        def deviation(match: re.Match) -> str:
            of = next((m for m in (match[1], match[3]) if self.sources.deviations.get(m)), module)
            entry, name = self.sources.deviations.get(of, {}).get(f"D{match[2]}"), f"D{match[2]}"
            link = f'<a class="dev" href="{of}.html#{name}" title="{html.escape(entry or "")}">{name}</a>'
            return match[0].replace(name, link, 1) if entry else match[0]

        def tag(match: re.Match) -> str:
            known = int(match[1]) in self.sources.equations[method]
            return f'<a class="tag" href="{method}.html#eq-{match[1]}">{match[0]}</a>' if known else match[0]

        pieces, end = [], 0
        for match, method, _ in equations_in(text, module):
            tags = re.sub(r"(?:Eq\. )?\((\d+)\)", tag, match[0])
            pieces += [DEVIATION.sub(deviation, text[end:match.start()]), tags]
            end = match.end()
        return "".join([*pieces, DEVIATION.sub(deviation, text[end:])])

    def inline(self, text: str, module: str) -> str:
        return re.sub("`(.+?)`", r"<code>\1</code>", self.refer(escape(text), module))

    def says(self, text: str | Equation, module: str) -> str:
        """A docstring as paragraphs, where a line that is indented continues the one before; an equation, set."""
        if isinstance(text, Equation):
            name = f"{METHODS[text.method]}, Eq. ({text.number})"
            link = f'<a class="tag" href="{text.method}.html#eq-{text.number}">{name}</a>'
            return f'<div class="math">{mathml(text.latex, "block")}{link}</div>'
        joined = (re.sub(r"\n(?!- )(?=\S)|\n +", " ", part) for part in re.split(r"\n\s*\n", text))
        return "".join(f"<p>{self.inline(line, module)}</p>" for part in joined for line in part.split("\n"))

    def markdown(self, text: str, module: str) -> str:
        formulas = iter(re.findall(r"\$([^$]+)\$", text))
        rendered = MARKDOWN.render(re.sub(r"\$[^$]+\$", "\ue000", text))
        rendered = rendered.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
        linked = [p if p[:1] == "<" else self.refer(p, module) for p in re.split(r"(<[^>]*>)", rendered)]
        return re.sub("\ue000", lambda _: mathml(next(formulas)), "".join(linked))

    def card(self, equation: Equation) -> str:
        where = "; ".join(f"{name}, line " + ", ".join(f'<a href="{module}.html#L{n}">{n}</a>' for module, n in places)
                          for name, places in equation.lines.items())
        title = f"Eq. ({equation.number}): {escape(equation.title)}"
        return (f'<section class="eq" id="eq-{equation.number}"><h3>{title}</h3>'
                f'<div class="wide">{mathml(equation.latex, "block")}</div>'
                f'<p class="where">Paper: {escape(equation.paper)}. Code: {where}.</p>'
                f"{self.markdown(equation.text, equation.method)}</section>")

    # ---- Code ----

    def highlight(self, source: Source) -> list[str]:
        """The lines as HTML: styled, names linked to their definitions, tags to equations."""
        links, lines, column = self.sources.links(source), [""], 0
        for kind, text in PythonLexer(stripnl=False).get_tokens(source.text):
            style = next((s for k, s in STYLES.items() if kind in k), "")
            for part in filter(None, re.split(r"(\n)", text)):
                if part == "\n":
                    lines.append("")
                    column = 0
                    continue
                if kind in Comment and not source.lines[len(lines) - 1][:column].strip():
                    self.comments[source.name].add(len(lines))
                piece = self.refer(escape(part), source.name) if kind in Comment else escape(part)
                name, target = links.get((len(lines), column), ("", ""))
                piece = f'<a href="{target}">{piece}</a>' if name == part else piece
                lines[-1] += f'<span class="{style}">{piece}</span>' if style else piece
                column += len(part)
        return lines

    def unfolded(self, target: str, this: str, method: str, path: tuple[str, ...] = ()) -> dict[int, str]:
        """{line of a function: what is called there, in place and closed, and in it what that calls}."""
        blocks: dict[int, str] = {}
        for n, called in self.sources.calls(target, this, method).items():
            for callee, owner in called:
                if callee not in (*path, target):
                    source, (module, _, name) = self.sources[callee.partition(".")[0]], callee.partition(".")
                    first, last = source.span(name)
                    inner = self.unfolded(callee, owner, method, (*path, target))
                    link = f'<a href="{module}.html#{name}">{module}.py, line {first}</a>'
                    rows = self.rows(source, first, last, inner, ids=False)
                    blocks[n] = f"{blocks.get(n, '')}<details><summary>{callee} {link}</summary>{rows}</details>"
        return blocks

    def rows(self, source: Source, first: int, last: int, unfolded: dict[int, str], ids: bool = True) -> str:
        """Lines first..last in rows: left docstrings, comments and the equations tagged there, right the code, in it
        what is unfolded after a line. ids: of lines and definitions; once on a page."""
        rows, says, math, code, name, skip = [], "", "", "", "", 0
        comments, beside = self.comments[source.name], self.sources.beside
        for n in range(first, last + 2):
            begins = source.starts.get(n, "")
            if n > last or code and (begins or n in comments):
                pre = f"<pre>{code.rstrip()}</pre>".replace("<pre></pre>", "")
                place = f' id="{name}"' if name and ids else ""
                rows.append(f'<div class="row"{place}><div class="says">{says}{math}</div>'
                            f'<div class="code">{pre}</div></div>')
                says, math, code, name = "", "", "", ""
            if skip < n <= last:
                name = begins or name
                math += "".join(self.says(equation, source.name) for equation in beside.get((source.name, n), []))
                place = f' id="L{n}"' if ids else ""
                if n in source.docstrings:
                    skip, text = source.docstrings[n]
                    says += self.says(text, source.name)
                elif n in comments:
                    line = self.inline(source.lines[n - 1].strip().lstrip("# "), source.name)
                    before = f"{says.removesuffix('</p>')} " if says and n - 1 in comments else f"{says}<p>"
                    says = f"{before}<span{place}>{line}</span></p>"
                elif source.lines[n - 1].strip():
                    gap = "\n" if code and not source.lines[n - 2].strip() else ""
                    code += f'{gap}<span class="l"{place} data-n="{n}">{self.code[source.name][n - 1]}</span>\n'
                    if n in unfolded:
                        code = f"{code.rstrip()}</pre>{unfolded[n]}<pre>"
        return "".join(rows)

    # ---- Pages ----

    def head(self, source: Source) -> dict[str, str]:
        """{heading: HTML} of what stands above the code: the docstring by its headings, equations, deviations."""
        parts, found = HEADINGS.split(source.about.partition("\n")[2]), {}
        for title, text in zip(["About", *parts[1::2]], parts[::2]):
            text = text.strip("\n")
            if title == "Deviations":  # in full
                entries = "".join(f'<dt id="{name}">{name}</dt><dd>{self.markdown(entry, source.name)}</dd>'
                                  for name, entry in self.sources.deviations[source.name].items())
                equations = self.sources.equations.get(source.name, {}).values()
                found |= {"Equations": "".join(map(self.card, equations)), "Deviations": f"<dl>{entries}</dl>"}
            elif text.startswith(" ") or "-->" in text:
                found[title] = f'<pre class="wide">{self.refer(escape(textwrap.dedent(text)), source.name)}</pre>'
            elif text.strip():
                found[title] = self.says(text[:1].upper() + text[1:], source.name)
        if source.name in METHODS:
            legend = re.search(r"Shape legend.+?(?=\n\n)", self.sources["common"].about, re.S)
            found["Shapes"] = self.says(legend[0], "common")
        return {title: text for title, text in found.items() if text}

    def page(self, name: str, runs: Path | None, out: Path) -> str:
        source = self.sources[name]
        sections = {title: f"<section>{text}</section>" for title, text in self.head(source).items()}
        banners = [(n, m[1]) for n, line in enumerate(source.lines, 1) if (m := re.match(r"# ==== (.+) ====$", line))]
        banners = [(source.tree.body[0].end_lineno, "Imports"), *banners, (len(source.lines) + 1, "")]
        for (first, title), (end, _) in zip(banners, banners[1:]):
            step = name in METHODS and first < source.span("train_step")[0] < end
            unfolded = self.unfolded(f"{name}.train_step", "", name) if step else {}
            sections[title] = self.rows(source, first + 1, end - 1, unfolded)
        if name in METHODS:
            sections["The demo"] = self.demo(name, runs, out)
        contents = "".join(f'<li><a href="#s{i}">{escape(title)}</a></li>' for i, title in enumerate(sections))
        texts = "".join(f'<h2 id="s{i}">{escape(title)}</h2>{text}' for i, (title, text) in enumerate(sections.items()))
        lead = escape(source.about.split("\n\n")[0])
        return f'<p class="lead">{lead}</p><nav><ul class="toc">{contents}</ul></nav>{texts}'

    def demo(self, name: str, runs: Path | None, out: Path) -> str:
        """The numbers of the run in `runs`, or how to get them."""
        command, folder = f'<pre class="wide">python {name}.py --preset demo</pre>', (runs or Path()) / f"{name}-demo"
        if not runs or not (folder / "metrics.json").is_file():
            return (f"{command}<p>makes out/{name}-demo on a CPU in a few minutes; then "
                    "<code>python docs/annotate.py --runs out</code> shows here what it logged and found.</p>")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        rows = {row: values for row, values in metrics.items() if isinstance(values, dict)}
        columns = [c for c in dict.fromkeys(c for values in rows.values() for c in values)
                   if any(isinstance(values.get(c), float) for values in rows.values())]
        cells = [[row, *(f"{values[c]:.3f}" if isinstance(values.get(c), float) else "-" for c in columns)]
                 for row, values in rows.items()]
        pictures = ""
        for file, says in {"curves.png": "curves of the training", "predictions.png": "what it finds"}.items():
            if (folder / file).is_file():
                shutil.copy(folder / file, out / f"{name}-{file}")
                pictures += f'<p><img src="{name}-{file}" alt="{METHODS[name]}: {says}" loading="lazy"></p>'
        numbers = table(["", *columns], cells)
        return f"{command}<p>{metrics.get('steps')} steps, then on unseen images:</p>{numbers}{pictures}"

    def index(self) -> str:
        def items(names) -> str:
            return "".join(f'<li><a href="{name}.html">{PAGES[name]}</a> {escape(self.about(name))}</li>'
                           for name in names)
        return INDEX.format(methods=items(METHODS), shared=items(SHARED), compare=PAGES["compare"])

    def about(self, name: str) -> str:
        """The first sentence of a module's docstring."""
        return self.sources[name].about.split("\n\n")[0].replace("\n", " ").partition(": ")[2 if name in METHODS else 0]

    def build(self, out: Path, runs: Path | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        bodies = {"index": self.index(), "compare": side_by_side.page(self),
                  **{name: self.page(name, runs, out) for name in self.sources}}
        for name, body in bodies.items():
            current = ' aria-current="page"'
            pages = "".join(f'<a href="{page}.html"{current if page == name else ""}>{title}</a>'
                            for page, title in PAGES.items() if page not in SHARED[1:])
            (out / f"{name}.html").write_text(PAGE.format(title=PAGES[name], pages=pages, body=body), encoding="utf-8")
        shutil.copy(Path(__file__).with_suffix(".css"), out / "annotate.css")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("site"), help="folder of the pages (default: site)")
    parser.add_argument("--runs", type=Path, help="folder with the demos' output folders, such as out")
    args = parser.parse_args(argv)
    if args.runs and not args.runs.is_dir():
        parser.error(f"--runs {args.runs}: there is no such folder")
    Site().build(args.out, args.runs)
    print(f"open {args.out / 'index.html'}")


if __name__ == "__main__":
    main()
