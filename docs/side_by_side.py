"""The page of docs/annotate.py that lays the five methods side by side: their training steps and their knobs."""
from __future__ import annotations

import collections
import html
import re
from typing import Any

from sources import METHODS, Sources

# Where a part of a training step begins.
PARTS = {"Before the forward pass": "", "Forward": r"zero_grad\(\)", "Loss": r"= \w+_loss\(", "Step": r"\bbackward\("}
PAGE = """<p class="lead">Five training steps, part by part; lines that at least three of them have are pale.</p>
<h2>Training steps</h2><div class="steps">{steps}</div>
<h2>Knobs with different defaults</h2>
<p>Defaults reproduce the published numbers. A value leads to its line, which says where it is from.</p>{shared}
<h2>Knobs that one method has</h2>{single}
"""


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML; scrolls within itself."""
    kinds = [("th", head), *(("td", row) for row in rows)]
    lines = "".join(f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in row)}</tr>" for tag, row in kinds)
    return f'<div class="wide"><table>{lines}</table></div>'


def step_parts(sources: Sources, name: str) -> dict[str, list[int]]:
    """{part of the training step: its lines}, without the docstring."""
    source, order = sources[name], list(PARTS)
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    first, last = source.span("train_step")
    docstring = source.defs["train_step"].body[0]
    for n in range(first, last + 1):
        if not docstring.lineno <= n <= docstring.end_lineno:
            if order[1:] and re.search(PARTS[order[1]], source.lines[n - 1]):
                order.pop(0)
            parts[order[0]].append(n)
    return parts


def training_steps(site: Any) -> str:
    parts = {name: step_parts(site.sources, name) for name in METHODS}
    text = {name: {n: site.sources[name].lines[n - 1] for lines in of.values() for n in lines}
            for name, of in parts.items()}
    often = collections.Counter(line for of in text.values() for line in {t.strip() for t in of.values()})
    cells = ""
    for part in PARTS:
        cells += f"<h3>{part}</h3>"
        for name, title in METHODS.items():
            lines = parts[name][part]
            inset = min((len(text[name][n]) - len(text[name][n].lstrip()) for n in lines), default=0)
            code = ""
            for n in lines:
                style = "l same" if often[text[name][n].strip()] > 2 else "l"
                code += f'<span class="{style}" data-n="{n}">{site.code[name][n - 1][inset:]}</span>\n'
            cells += f'<div><a href="{name}.html#train_step">{title}</a><pre>{code.rstrip()}</pre></div>'
    return cells


def knobs(site: Any) -> dict[str, str]:
    """Tables: shared, of the knobs with which at least two methods start differently; single, of one method."""
    of = {name: site.sources.knobs(name) for name in METHODS}
    shared, single = [], {name: [] for name in METHODS}
    for knob in dict.fromkeys(k for mine in of.values() for k in mine):
        having = [name for name in METHODS if knob in of[name]]
        cells = {}
        for name in having:
            default, comment, module, n = of[name][knob]
            place = f'href="{module}.html#L{n}" title="{html.escape(comment)}"'
            cells[name] = f"<a {place}><code>{escape(default)}</code></a>"
        if len(having) == 1:
            says = site.refer(escape(of[having[0]][knob][1]), having[0])
            single[having[0]].append([METHODS[having[0]], f"<code>{knob}</code>", cells[having[0]], says])
        elif len({of[name][knob][0] for name in having}) > 1:
            shared.append([f"<code>{knob}</code>", *(cells.get(name, "-") for name in METHODS)])
    return {"shared": table(["knob", *METHODS.values()], shared),
            "single": table(["method", "knob", "default", "what it is"], sum(single.values(), []))}


def page(site: Any) -> str:
    return PAGE.format(steps=training_steps(site), **knobs(site))
