"""Does it help? The five papers' claims at laptop scale: who wins, and which part helps, with seeds and spread.

  python benchmarks/claims.py                                   # all of it, where it was left; hours on two cores
  python benchmarks/claims.py --only detreg-scratch --seeds 2   # one claim, two seeds
  python benchmarks/claims.py --list                            # what there is, and what is left to run
  python benchmarks/claims.py --report                          # write claims.md and the pictures again, run nothing

Rows for compare.py, whose settings and prose are in claims.txt: an arm is a chain of runs (proposals, backbone,
pretraining, fine-tuning); a claim compares two arms seed by seed. Unlabelled images, their proposals and the frozen
backbone of the DETR family are the same for all seeds; the seed draws labelled and test scenes, weights and order.
Finished runs are lines of claims.jsonl; checkpoints lie in out/claims until nothing needs them.

Judged claims get a word, from the 95 % t-interval of the paired differences over seeds: holds (all of it above zero),
does not hold (below), inconclusive (zero inside). "No worse" holds where all of the interval lies above -10 % of the
other arm's mean. The others stand without a word, with fewer seeds.
"""
from __future__ import annotations

import argparse
import configparser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import compare  # first: it finds the project's files
from compare import ROOT, Run, in_order

import numpy as np

import curves
from common import UserError
from data import SyntheticScenes, open_images
from run import Parser, cli, print_rank0

HERE = Path(__file__).resolve().parent
TEXT = configparser.ConfigParser(interpolation=configparser.ExtendedInterpolation())
TEXT.read(HERE / "claims.txt", encoding="utf-8")
SYNTHETIC, BCCD = BOTH = ("synthetic", "bccd")
VOC, FEW, LARGE = ("voc07", "voc07_10", "voc07_gpu")  # with all labels, with a tenth, with a tenth and on a GPU
SCALES = {"cpu": (*BOTH, VOC, FEW), "gpu": (LARGE,)}
DATA = [name for names in SCALES.values() for name in names]
DETR_FAMILY = ("detreg", "updetr", "siamese_detr")
SCENES = 800


# ==== 1. Data sets ====


def places_of(args: argparse.Namespace) -> dict[str, str]:
    """What stands for a path in the flags, so that a run has the same key on every machine."""
    return {"{scenes}": str(args.work / "scenes"), "{resnet18}": str(args.shared / "weights/resnet18_imagenet.pth"),
            **{f"{{{name}}}": str(args.shared / name) for name in (BCCD, VOC)},
            **{f"{{{name}_images}}": str(args.work / f"{name}.txt") for name in (BCCD, VOC)}}


def prepare(args: argparse.Namespace, have: list[str]) -> None:
    """The unlabelled images: drawn scenes as files, and lists of the trainval splits of BCCD and VOC, so that nobody
    pretrains on what is tested on."""
    scenes = args.work / "scenes"
    scenes.mkdir(parents=True, exist_ok=True)
    source = SyntheticScenes(SCENES, seed=0)
    for i in range(SCENES if SYNTHETIC in have else 0):
        if not (path := scenes / f"{i:04d}.png").exists():
            source.scene(i)[0].save(path.with_suffix(".part"), "PNG")
            path.with_suffix(".part").rename(path)
    for name in {data.split("_")[0] for data in have} - {SYNTHETIC}:
        images = open_images("voc", str(args.shared / name))
        lines = "".join(f"{images.root / images.key(i)}\n" for i in range(len(images)))
        (args.work / f"{name}.txt").write_text(lines)


# ==== 2. Arms ====


class Arm(NamedTuple):
    name: str
    run: Callable[[str, int], Run]  # of (data, seed)
    path: str  # which number of it (compare.value)


def run(data: str, script: str, seed: int, *parts: Any) -> Run:
    """A run of the data set's preset; text is split at spaces."""
    words = [word for part in parts
             for word in (part.split() if isinstance(part, str) else [part] if isinstance(part, Run) else part)]
    return Run(script, (*TEXT[data]["preset"].split(), "--seed", str(seed), *words))


def backbone(data: str) -> Run | str:
    """The frozen backbone of the DETR family: one for all seeds and arms, as the papers have one SwAV; DUPR's on the
    same unlabelled images, or a file (one of the places)."""
    flags = TEXT[data]["backbone"]
    return flags if flags.startswith("{") else run(data, "dupr", 0, TEXT[data]["unlabelled"], flags)


def pretrained(script: str, data: str, seed: int, more: str = "") -> Run:
    flags, boxes, start = TEXT[data], (), ()
    if script in ("detreg", "siamese_detr", "soco") and "--proposal_method" not in more:
        store = Run("proposals", (*flags["unlabelled"].split(), "--seed", "0", "--rank", flags["rank"]))
        boxes = ("--proposal_store", store)
    if script in DETR_FAMILY:
        rate = () if "--lr_backbone" in more else ("--lr_backbone", "0")  # then its BatchNorm is constant too
        start = ("--backbone_weights", backbone(data), *flags["norm"].split(), *rate, *flags["views"].split())
    return run(data, script, seed, flags["unlabelled"], boxes, start, flags[script], more)


def tuned(name: str, script: str, path: str, start: Callable[[str, int], tuple[Any, ...]]) -> Arm:
    """The fine-tuning of a method's claims, from what `start` says."""
    return Arm(name, lambda data, seed: run(data, "finetune", seed, TEXT[data]["labelled"],
                                            TEXT[data][f"tune_{script}"], *start(data, seed)), path)


def after(name: str, script: str, more: str = "", path: str = "AP") -> Arm:
    """Fine-tuned from what `script` pretrains."""
    return tuned(name, script, path, lambda data, seed: ("--init_from", pretrained(script, data, seed, more)))


def scratch(script: str, path: str = "AP") -> Arm:
    """The same detector; of the DETR family on the same backbone, its transformer from scratch."""
    return tuned("scratch", script, path, lambda data, seed: (
        ("--backbone_weights", backbone(data)) if script in DETR_FAMILY else (), TEXT[data][f"scratch_{script}"]))


def analysis(name: str, figure: str, path: str) -> Arm:
    """One of DUPR's figures, drawn of the two checkpoints of a seed and of those that stand `beside` them."""
    def make(data: str, seed: int) -> Run:
        pair = ("dupr=", pretrained("dupr", data, seed), "image=", pretrained("dupr", data, seed, IMAGE_ONLY))
        return Run("figures", (figure, "--checkpoint", *pair, *TEXT[data].get("beside", "").split(),
                               *TEXT[data]["labelled"].split(), "--seed", str(seed), *TEXT[data]["figures"].split()))
    return Arm(name, make, f"checkpoints/{path}")


def pretext(name: str, script: str, path: str, more: str = "") -> Arm:
    return Arm(name, lambda data, seed: pretrained(script, data, seed, more), path)


# ==== 3. Claims ====


@dataclass
class Claim:
    """a is better than b; claims.txt has that in words, the paper's numbers (table, row), and maybe a note. sign -1:
    smaller is better. margin: "no worse", by this share of b's mean, rather than better."""
    name: str
    a: Arm
    b: Arm
    data: tuple[str, ...] = (SYNTHETIC,)
    judged: bool = True
    sign: int = 1
    margin: float = 0.0

    def said(self, what: str) -> str:
        return " ".join(TEXT[self.name].get(what, "").split())


PATCH_ONLY, CONV5_ONLY = "--alpha 0 0 0 0 --beta 0 0 0 1", "--alpha 0 0 0 1 --beta 0 0 0 0"
IMAGE_ONLY = "--beta 0 0 0 0"
PUBLISHED = "--match_own false --aligned_start false --standardized_start 0"
UNTRAINED = "--max_steps 1 --probe_images 0 --probe_every 0"
DUPR = (("DUPR", "dupr"), ("beta = 0", "image"))  # arms, and what `analysis` calls them


def claims() -> list[Claim]:
    judged = [
        Claim("detreg-scratch", after("DETReg", "detreg"), scratch("detreg"), tuple(DATA)),
        *(Claim(f"detreg-tuned-{path.lower()}", after("DETReg", "detreg", path=path), scratch("detreg", path),
                (*BOTH, FEW, LARGE)) for path in ("AP50", "AP75", "AR10")),
        Claim("detreg-tuned-classes", after("DETReg", "detreg", path="class_error"), scratch("detreg", "class_error"),
              (FEW, LARGE), sign=-1),
        Claim("detreg-boxes", after("own boxes", "detreg"), after("other image's", "detreg", "--strategy other_image"),
              (SYNTHETIC, FEW)),
        Claim("detreg-ar10", pretext("DETReg", "detreg", "pretrained/AR10"),
              pretext("selective search", "detreg", "selective_search/AR10"), (*BOTH, FEW)),
        *looks("updetr", "updetr"),
        Claim("updetr-scratch", after("UP-DETR", "updetr"), scratch("updetr"), (*BOTH, VOC, LARGE)),
        Claim("updetr-start", after("UP-DETR", "updetr"), after("one step", "updetr", UNTRAINED), (VOC, LARGE)),
        Claim("updetr-speed", after("UP-DETR", "updetr", path="mean AP"), scratch("updetr", "mean AP"), (*BOTH, VOC)),
        *looks("siamese", "siamese_detr"),
        Claim("siamese-scratch", after("Siamese DETR", "siamese_detr"), scratch("siamese_detr"), (*BOTH, VOC, LARGE)),
        Claim("siamese-start", after("Siamese DETR", "siamese_detr"), after("one step", "siamese_detr", UNTRAINED),
              (VOC, LARGE)),
        Claim("siamese-views", after("multi-view R-C G", "siamese_detr"),
              after("single-view R-O", "siamese_detr", "--multi_view false --region_target object --lambda_global 0"),
              margin=0.1),
        Claim("soco-scratch", after("SoCo", "soco"), scratch("soco"), BOTH),
        Claim("soco-momentum", after("0.99", "soco"), after("0.98", "soco", "--ema_momentum 0.98"), (BCCD,)),
        Claim("dupr-match", *(analysis(name, "match", f"{which}/within_1") for name, which in DUPR), (SYNTHETIC, VOC)),
        Claim("dupr-slope", *(analysis(name, "iou-similarity", f"{which}/difference") for name, which in DUPR),
              (SYNTHETIC, VOC)),
        Claim("dupr-c4", after("DUPR", "dupr"), after("beta = 0", "dupr", IMAGE_ONLY), (BCCD,)),
    ]
    reported = [
        Claim("detreg-embedding", after("lambda_e 1", "detreg"), after("lambda_e 0", "detreg", "--lambda_e 0")),
        Claim("updetr-patches", after("M = 10", "updetr"), after("M = 1", "updetr", "--num_patches 1 --num_queries 3")),
        Claim("updetr-frozen", after("frozen", "updetr"), after("trained", "updetr", "--lr_backbone 0.0006")),
        Claim("updetr-mask", pretext("mask", "updetr", "last loss"),
              pretext("none", "updetr", "last loss", "--attention_mask false"), sign=-1),
        Claim("siamese-random", after("selective search", "siamese_detr"),
              after("random", "siamese_detr", "--proposal_method random")),
        Claim("siamese-edge", after("edge boxes", "siamese_detr", "--proposal_method edge_boxes --cache_proposals"),
              after("selective search", "siamese_detr")),
    ]
    reported += [Claim(f"{name}-ceiling", analysis("DUPR", figure, f"dupr/{path}"),
                       analysis("ImageNet", figure, f"imagenet/{path}"), (VOC,))
                 for name, figure, path in (("dupr-match", "match", "within_1"),
                                            ("dupr-slope", "iou-similarity", "difference"))]
    off = ["--proposal_method whole --num_boxes 1", "--fpn false", "--box_head false", "--scale_aware false",
           "--jitter_prob 0", "--multi_view false"]
    names = ("whole image", "+ proposals", "+ FPN", "+ head", "+ scale-aware", "+ jitter", "+ multi-view")
    steps = [after(name, "soco", " ".join(off[i:])) for i, name in enumerate(names)]
    reported += [Claim(f"soco-ablation-{i}", steps[i], steps[i - 1], (BCCD,)) for i in range(1, len(steps))]
    reported += [Claim(f"soco-boxes-{k}", after("K = 4", "soco"), after(f"K = {k}", "soco", f"--num_boxes {k}"),
                       (BCCD,)) for k in (1, 8, 16)]
    reported += [Claim(f"dupr-{path.lower()}", after("patch", "dupr", PATCH_ONLY, path),
                       after("image", "dupr", CONV5_ONLY, path), (BCCD,)) for path in ("AP50", "AP75")]
    for one in reported:
        one.judged = False
    return judged + reported


def looks(name: str, script: str) -> list[Claim]:
    """Does pretraining teach to look: looking after it and before it, of one run; adapted, and with the published
    matching and start."""
    return [Claim(f"{name}-{how}", pretext("after", script, "last looking", more),
                  pretext("before", script, "first looking", more), (VOC, LARGE))
            for how, more in (("looks", ""), ("published", PUBLISHED))]


CLAIMS = claims()


# ==== 4. Results ====


@dataclass
class Comparison:
    """A claim on one data set: what its arms had for every seed that has finished."""
    claim: Claim
    data: str
    seeds: list[int]
    a: list[float]
    b: list[float]

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean of the paired differences, a better than b above zero, and its 95 % t-interval."""
        return compare.interval(*((self.a, self.b) if self.claim.sign > 0 else (self.b, self.a)))

    @property
    def word(self) -> str:
        _, low, high = self.interval
        return ("one seed" if len(self.a) < 2 else "**holds**" if low > -self.claim.margin * abs(np.mean(self.b))
                else "**does not hold**" if high < 0 else "**inconclusive**")


def compared(claim: Claim, data: str, seeds: range, results: dict[str, dict]) -> Comparison | None:
    pairs = {seed: [results.get(arm.run(data, seed).key) for arm in (claim.a, claim.b)] for seed in seeds}
    rows = [(seed, compare.value(a, claim.a.path), compare.value(b, claim.b.path))
            for seed, (a, b) in pairs.items() if a and b]
    return Comparison(claim, data, *map(list, zip(*rows))) if rows else None


def markdown(comparisons: list[Comparison], results: dict[str, dict], used: list[Run]) -> str:
    def row(c: Comparison) -> str:
        cells = [c.claim.said("text"), c.data, c.claim.said("paper"), f"{c.claim.a.name} {np.mean(c.a):.3f}",
                 f"{c.claim.b.name} {np.mean(c.b):.3f}", compare.in_words(*c.interval), str(len(c.a)),
                 *([c.word] * c.claim.judged)]
        return "| " + " | ".join(cells) + " |"

    def table(judged: bool) -> list[str]:
        head = ["claim" if judged else "question", "data", "paper", "a, here", "b, here", "a better by [95 %]",
                "seeds", *(["verdict"] * judged)]
        return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
                *(row(c) for c in comparisons if c.claim.judged == judged), ""]

    spent = [results[r.key] for r in used]
    lines = ["# Do the papers' claims hold at laptop scale?", "", " ".join(TEXT["introduction"]["text"].split()), "",
             f"Written by `python benchmarks/claims.py` from claims.jsonl: {compare.cost(spent)}.", "",
             "![bars](claims-bars.png)", "", "![curves](claims-curves.png)", "", "## Judged", "", *table(True),
             "## Reported, not judged", "", *table(False), "## Notes", ""]
    notes = {c.claim.name: c.claim.said("note") for c in comparisons}
    lines += [f"- {name}: {note}" for name, note in notes.items() if note]
    lines += ["", "## Seed by seed", "", "| comparison | data | number | a | b |", "|---|---|---|---|---|"]
    for c in comparisons:
        lines.append(f"| {c.claim.name}: {c.claim.a.name} / {c.claim.b.name} | {c.data} | {c.claim.a.path} | "
                     + " | ".join(", ".join(f"{v:.4f}" for v in values) for values in (c.a, c.b)) + " |")
    lines += ["", "## Flags", "", "All with `--device`, `--num_workers 0` and `--out`; "
              "<...> is the file that another run wrote. Seed 0:", "", "```",
              *(run.command for run in used if run.flags[run.flags.index("--seed") + 1] == "0"), "```", ""]
    return "\n".join(lines)


# ==== 5. Main ====


def runs_of(claim: Claim, data: str, seeds: range) -> list[Run]:
    return in_order(arm.run(data, seed) for seed in seeds for arm in (claim.a, claim.b))


def cells_of(claims: list[Claim], args: argparse.Namespace) -> list[tuple[Claim, str, range]]:
    """(claim, data set, seeds) of every comparison."""
    return [(claim, data, range(args.first_seed, args.first_seed + (args.seeds or (5 if claim.judged else 3))))
            for claim in claims for data in claim.data]


def report(args: argparse.Namespace) -> list[Comparison]:
    """claims.md and its pictures, of all claims that have results, whatever --only says."""
    results, cells = compare.read_results(args.results), cells_of(CLAIMS, args)
    comparisons = [c for cell in cells if (c := compared(*cell, results))]
    if not comparisons:
        print_rank0("no claim has both its arms yet")
        return []
    stem = args.results.with_suffix("")
    curves.draw_panels(f"{stem}-bars.png", [
        curves.bars({c.claim.a.name: c.a, c.claim.b.name: c.b}, title=f"{c.claim.name} ({c.data})")
        for c in comparisons], columns=4)
    panels = {}  # of another number of the same runs, one
    for c in comparisons:
        name, arms = c.claim.a.path.split()[-1], {arm.name: arm for arm in (c.claim.a, c.claim.b)}
        panels.setdefault(tuple(arm.run(c.data, 0).key for arm in arms.values()), (
            f"{c.claim.name} ({c.data}): {name}", name,
            {of: [results[arm.run(c.data, seed).key] for seed in c.seeds] for of, arm in arms.items()}))
    compare.draw_curves(Path(f"{stem}-curves.png"), panels.values())
    used = [run for run in in_order(r for cell in cells for r in runs_of(*cell)) if run.key in results]
    Path(f"{stem}.md").write_text(markdown(comparisons, results, used))
    for c in comparisons:
        print_rank0(f"{c.claim.name:22} {c.data:10} {c.claim.a.name} {np.mean(c.a):.4f}  {c.claim.b.name} "
                    f"{np.mean(c.b):.4f}  {compare.in_words(*c.interval)} {len(c.a)} seeds  "
                    f"{c.word.strip('*') if c.claim.judged else ''}")
    print_rank0(f"wrote {stem}.md, {stem.name}-bars.png, {stem.name}-curves.png")
    return comparisons


def main(argv: list[str] | None = None) -> list[Comparison]:
    parser = Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="claims whose name begins with one of these (--list)")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="gpu: rows for some minutes of one")
    parser.add_argument("--data", nargs="+", choices=DATA, help="default: all of the scale")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data",
                        help="folder of the data sets (bccd: BCCD, in VOC layout); rows without theirs are left out")
    parser.add_argument("--results", type=Path, default=HERE / "claims.jsonl",
                        help="finished runs; claims.md and the pictures are written beside it")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "claims", help="checkpoints and logs of the runs")
    compare.add_flags(parser, "5 for what is judged, 3 for the rest")
    args = parser.parse_args(argv)
    args.work, args.shared = args.work.resolve(), args.shared.resolve()
    compare.separate_trial(args)
    args.data = args.data or SCALES[args.scale]
    chosen = [c for c in CLAIMS if not args.only or c.name.startswith(tuple(args.only))]
    if not chosen:
        raise UserError(f"--only {' '.join(args.only)}: no such claim; there are {', '.join(c.name for c in CLAIMS)}")
    have = [d for d in args.data if all((args.shared / name).exists() for name in TEXT[d]["needs"].split())]
    if missing := sorted(set(args.data) - set(have)):
        print_rank0(f"note: {', '.join(missing)}: not in {args.shared}, its rows are left as they are "
                    "(--shared FOLDER). bccd: BCCD_Dataset by Shenggan, MIT, on GitHub. voc07: VOC "
                    "2007 in our splits, and weights/resnet18_imagenet.pth")
    planned = [cell for cell in cells_of(chosen, args) if cell[1] in args.data]
    if args.list:
        results = compare.read_results(args.results)
        for claim, data, seeds in planned:
            plan = runs_of(claim, data, seeds)
            print_rank0(f"{claim.name:22} {data:10} {'judged' if claim.judged else 'reported':9} {len(plan):3} runs, "
                        f"{sum(r.key not in results for r in plan):3} to do: {claim.said('text')}")
        return []
    if not args.report:
        prepare(args, have)
        compare.run_all([r for cell in planned if cell[1] in have for r in runs_of(*cell)], args, places_of(args),
                        later=[r for cell in cells_of(CLAIMS, args) for r in runs_of(*cell)])
    return report(args)


if __name__ == "__main__":
    cli(main)
