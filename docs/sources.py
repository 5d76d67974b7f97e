"""What docs/annotate.py knows of the code, read as text: definitions, docstrings, D-numbers, knobs, who calls whom, and
the equations of docs/equations with the lines that carry their tags."""
from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"detreg": "DETReg", "updetr": "UP-DETR", "siamese_detr": "Siamese DETR", "soco": "SoCo", "dupr": "DUPR"}
SHARED = ("common", "data", "proposals", "detectors", "run", "evaluation", "convert", "annotations", "own", "figures")
EQUATIONS = re.compile(r"Eq\. \(\d+\)(?:(?:, |-| and )?\(\d+\))*")
# The class of the object that a training step has under a name, or under a name in a function or class ("" = unknown).
OBJECTS = {
    "criterion": "common.SetCriterion", "matcher": "common.HungarianMatcher", "backbone": "common.Backbone",
    "target_backbone": "common.Backbone", "position": "common.PositionEmbeddingSine", "feature_align": "common.MLP",
    "feature_embed": "common.MLP", "query_scale": "common.MLP", "ref_point_head": "common.MLP",
    "predict_boxes.head": "common.MLP", "encoder": "common.DETREncoder",
    "DETREncoder.layer": "common.DETREncoderLayer", "DETRDecoder.layer": "common.DETRDecoderLayer",
    "ConditionalDecoder.layer": "common.ConditionalDecoderLayer", "encode.layer": "common.DeformableEncoderLayer",
    "DeformableTransformer.layer": "common.DeformableDecoderLayer",
    "DeformableEncoderLayer.self_attn": "common.MSDeformAttn",
    "DeformableDecoderLayer.cross_attn": "common.MSDeformAttn",
}
DETR = {"detector": "common.DETR", "transformer": "common.DETRTransformer"}
OBJECTS_OF = {  # with each script's default detector
    "detreg": {"model": "detreg.DETReg", "descriptor": "detreg.RegionDescriptor", "detector": "common.DeformableDETR",
               "transformer": "common.DeformableTransformer"},
    "updetr": {**DETR, "model": "updetr.UPDETR", "decoder": "common.DETRDecoder"},
    "siamese_detr": {**DETR, "model": "siamese_detr.SiameseDETR", "module": "siamese_detr.SiameseDETR",
                     "decoder": "common.ConditionalDecoder"},
    "soco": {"model": "soco.SoCo", "module": "soco.SoCo", "neck": "soco.FPN", "encoder": "", "scaler": "soco.LARS"},
    "dupr": {"model": "dupr.DUPR", "module": "dupr.DUPR", "encoder_q": "dupr.Encoder", "encoder_k": "dupr.Encoder",
             "encoder": "", "queues": "dupr.Queue"},
}


@dataclass
class Equation:
    """A section of docs/equations/<method>.md. code: the functions that compute it; names: its symbols in them;
    lines: {function: where its tag stands in it, as (module, line)}."""
    method: str
    number: int
    title: str
    paper: str
    code: list[str]
    latex: str
    text: str
    names: list[str]
    lines: dict[str, list[tuple[str, int]]] = field(default_factory=dict)


def read_equations(method: str) -> list[Equation]:
    found, path = [], ROOT / "docs" / "equations" / f"{method}.md"
    for part in re.split(r"(?m)^## ", path.read_text(encoding="utf-8"))[1:]:
        match = re.match(r"Eq\. \((\d+)\): (.+)\n+Paper: (.+?)\.? Code: (.+)\n\s*\$\$((?s:.+?))\$\$((?s:.*))", part)
        if not match:
            raise SystemExit(f"{path}: expected '## Eq. (n): title', 'Paper: ... Code: ...' and '$$ ... $$', each on "
                             f"lines of its own, at {part[:60]!r}")
        number, title, paper, code, latex, text = match.groups()
        cells = [line.strip().strip("|").rpartition("|")[2] for line in text.splitlines() if line.startswith("|")]
        found.append(Equation(method, int(number), title, paper, re.findall(r"[\w.]+\w", code), latex.strip(), text,
                              [name for cell in cells[2:] for name in re.findall("`(.+?)`", cell)]))
    return found


def equations_in(text: str, module: str) -> list[tuple[re.Match, str, list[int]]]:
    """(match, method, numbers) of the equations named in a text of this module. Where several methods share a file, the
    paper's name stands beside the number: `UP-DETR, Eq. (2)` or `Eq. (2) of UP-DETR`."""
    found = []
    for match in EQUATIONS.finditer(text):
        named = [method for method, name in METHODS.items() if text[:match.start()].endswith(f"{name}, ")
                 or text[match.end():].startswith(f" of {name}")]
        method = [*named, "dupr" if module == "figures" else module][0]
        spans = re.findall(r"\((\d+)\)(?:-\((\d+)\))?", match[0])
        if method in METHODS:
            found.append((match, method, [n for a, b in spans for n in range(int(a), int(b or a) + 1)]))
    return found


class Source:
    """A module: its definitions by qualified name, docstrings, D-numbers, knobs."""

    def __init__(self, name: str):
        self.name, self.text = name, (ROOT / f"{name}.py").read_text(encoding="utf-8")
        self.lines, self.tree = self.text.splitlines(), ast.parse(self.text)
        self.defs: dict[str, ast.AST] = {}
        self.docstrings: dict[int, tuple[int, str]] = {}  # first line: (last line, text)
        self.imported = {a.asname or a.name: f"{node.module}.{a.name}" for node in self.tree.body
                         if isinstance(node, ast.ImportFrom) for a in node.names}
        for node in self.tree.body:
            for inner in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
                if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                    self.defs[inner.name if inner is node else f"{node.name}.{inner.name}"] = inner
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                self.docstrings[node.body[0].lineno] = node.body[0].end_lineno, text
        self.starts = {self.span(name)[0]: name for name in self.defs}
        self.about = ast.get_docstring(self.tree) or ""

    def span(self, name: str) -> tuple[int, int]:
        node = self.defs[name]
        return min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno

    def deviations(self) -> dict[str, str]:
        """D1, D2, ...: as docs/methods has them, in full, or as the module's docstring has them."""
        found = re.findall(r"(?m)^    (D\d+) +(.+(?:\n {8}.+)*)", self.about)
        if self.name in METHODS:
            text = (ROOT / "docs" / "methods" / f"{self.name}.md").read_text(encoding="utf-8")
            found = re.findall(r"(?ms)^- \*\*(D\d+)\*\* (.+?)(?=\n- |\n\n|\n#|\Z)", text)
        return {name: re.sub(r"\[(.+?)\]\(.+?\)", r"\1", " ".join(text.split())) for name, text in found}


class Sources(dict):
    """All modules that have a page, by name, and what their names mean."""

    def __init__(self):
        super().__init__((name, Source(name)) for name in (*METHODS, *SHARED))
        self.deviations = {name: source.deviations() for name, source in self.items()}
        self.equations = {method: {e.number: e for e in read_equations(method)} for method in METHODS}
        self.beside: dict[tuple[str, int], list[Equation]] = {}  # (module, line): the equations that are set there
        for equation in (e for equations in self.equations.values() for e in equations.values()):
            equation.lines = {name: self.tags(equation, name) for name in equation.code}
            if problem := self.problem(equation):
                raise SystemExit(f"docs/equations/{equation.method}.md, Eq. ({equation.number}): {problem}")
            # once in a file: in the last function named, which is the most particular, where it is computed
            for module, n in {places[0][0]: places[0] for places in equation.lines.values() if places}.values():
                self.beside.setdefault((module, n), []).append(equation)

    def tags(self, equation: Equation, name: str) -> list[tuple[str, int]]:
        """(module, line) of the equation's tags in a function, without its docstring."""
        module, _, qualified = name.partition(".")
        if module not in self or qualified not in self[module].defs:
            return []
        first, last = self[module].span(qualified)
        docstring = self[module].docstrings.get(self[module].defs[qualified].body[0].lineno, (0,))[0]
        return [(module, n) for n in range(max(first, docstring + 1), last + 1)
                for _, method, numbers in equations_in(self[module].lines[n - 1], module)
                if method == equation.method and equation.number in numbers]

    def problem(self, equation: Equation) -> str | None:
        """What is no longer true of an equation: a function without its tag, a symbol that its functions lack."""
        untagged = [name for name, places in equation.lines.items() if not places]
        if untagged or not equation.code:
            return f"no tag in {', '.join(untagged) or 'any function'}"
        words: set[str] = set()
        for name in equation.code:
            module, _, qualified = name.partition(".")
            for node in ast.walk(self[module].defs[qualified]):
                words |= {getattr(node, key) for key in ("id", "attr", "arg", "name", "value")
                          if isinstance(getattr(node, key, None), str)}
        missing = [name for name in equation.names if name not in words]
        return f"{', '.join(missing)}: not in {', '.join(equation.code)}" if missing else None

    def knobs(self, module: str, name: str = "Config") -> dict[str, tuple[str, str, str, int]]:
        """{field: (default, comment, module, line)} of a dataclass and of those it is derived from, as written."""
        source, found = self[module], {}
        node = source.defs[name]
        for base in node.bases[::-1]:
            of, _, cls = (self.resolve(base, source) or "").partition(".")
            found |= self.knobs(of, cls) if of else {}
        for field_ in node.body:
            if isinstance(field_, ast.AnnAssign):
                comment = source.lines[field_.end_lineno - 1].partition("  # ")[2]
                found[field_.target.id] = ast.unparse(field_.value), comment, module, field_.lineno
        return found

    def resolve(self, node: ast.AST, source: Source, this: str = "") -> str | None:
        """module.name of the definition that an expression names; this: the class of `self`, as module.Class."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "self" and this:
                return self.method_of(this, node.attr)
            full = f"{node.value.id}.{node.attr}"
        else:
            full = source.imported.get(getattr(node, "id", ""), f"{source.name}.{getattr(node, 'id', '')}")
        module, _, name = full.partition(".")
        return full if module in self and name in self[module].defs else None

    def method_of(self, this: str, name: str) -> str | None:
        """module.Class.name, of this class or of what it is derived from."""
        module, _, qualified = this.partition(".")
        if f"{qualified}.{name}" in self[module].defs:
            return f"{this}.{name}"
        bases = (self.resolve(base, self[module]) for base in self[module].defs[qualified].bases)
        return next((found for base in bases if base and (found := self.method_of(base, name))), None)

    def links(self, source: Source) -> dict[tuple[int, int], tuple[str, str]]:
        """{(line, column): (name, page#place)} of the names in a module whose definitions have a place."""
        found: dict[tuple[int, int], tuple[str, str]] = {}
        classes = [(f"{source.name}.{name}", d) for name, d in source.defs.items() if isinstance(d, ast.ClassDef)]
        for this, top in [("", source.tree), *classes]:
            called = {id(node.func) for node in ast.walk(top) if isinstance(node, ast.Call)}
            for node in ast.walk(top):
                name = getattr(node, "attr", getattr(node, "id", ""))
                # of bare names those that are called or are classes: others may be local
                if isinstance(node, ast.Attribute) or id(node) in called or name[:1].isupper():
                    if target := self.resolve(node, source, this):
                        found[node.end_lineno, node.end_col_offset - len(name)] = name, target.replace(".", ".html#", 1)
        return found

    def callee(self, call: ast.Call, source: Source, name: str, this: str, method: str) -> tuple[str, str] | None:
        """(the function that a call in function `name` runs, the class of its `self`), where it can be told."""
        objects = OBJECTS | OBJECTS_OF[method]

        def class_of(node: ast.AST) -> str | None:
            while isinstance(node, (ast.Subscript, ast.Call)):  # x[0] is an x, and so is getattr(x, "module", x)
                node = node.value if isinstance(node, ast.Subscript) else [*node.args, node.func][0]
            last = getattr(node, "attr", getattr(node, "id", ""))
            keys = [f"{part}.{last}" for part in name.split(".")[::-1]]
            return next((objects[key] for key in (*keys, last) if key in objects), None)

        found, owner = self.resolve(call.func, source, this), this
        if not found and isinstance(call.func, ast.Attribute) and (owner := class_of(call.func.value)):
            found = self.method_of(owner, call.func.attr)
        if not found and (owner := class_of(call.func)):
            found = self.method_of(owner, "forward") or self.method_of(owner, "__call__")
        module, _, qualified = (found or ".").partition(".")
        if not found or not isinstance(self[module].defs[qualified], ast.FunctionDef):
            return None
        return found, owner if "." in qualified else ""

    def calls(self, target: str, this: str, method: str) -> dict[int, list[tuple[str, str]]]:
        """{last line of a statement of a function: what it is the first to call}, each as `callee` returns it."""
        module, _, name = target.partition(".")
        source, called = self[module], {}
        for node in ast.walk(source.defs[name]):
            if isinstance(node, ast.stmt) and node is not source.defs[name]:
                parts = [p for p in ast.iter_child_nodes(node) if not isinstance(p, (ast.stmt, ast.ExceptHandler))]
                inner = [c for part in parts for c in ast.walk(part) if isinstance(c, ast.Call)]
                inner.sort(key=lambda c: (c.end_lineno, c.end_col_offset))
                last = max((getattr(n, "end_lineno", 0) for p in parts for n in ast.walk(p)), default=0)
                called.setdefault(last, []).extend(self.callee(c, source, name, this, method) for c in inner)
        seen: set = {None}
        return {n: [c for c in called[n] if not (c in seen or seen.add(c))] for n in sorted(called)}
