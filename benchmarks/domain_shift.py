"""Real domain shifts: source model, AdaBN, ConvLoRA and both on the target, over seeds. Writes a record.

    python benchmarks/domain_shift.py emoji     # EfficientNet-Lite0, categories: Noto to Fluent 3D and to Twemoji
    python benchmarks/domain_shift.py volumes   # residual U-Net, brain masks: a head to a macaque's and an average

Each cell is a run of `vislr adapt-domain` with the shipped config in `runs/domain-shift/`; finished ones are not
repeated, stopped ones go on. The source model of a seed is trained once and used for both targets. On two idle cores
about 8 minutes a seed (emoji; needs the extra `measure`) and 20 (volumes).

The volumes come from packages and are not part of vislr: Debian's mricron-data (apt-get install mricron-data) and
PyPI's nilearn; both have terms of their own. One volume a domain: a demonstration, no clinical claim.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from pathlib import Path

from vislr import measure
from vislr.measure.measurement import Measurement
from vislr.pipelines import adapt_domain

DEBIAN = Path("/usr/share/mricron/templates")
# target -> flags
EMOJI = {style: ["--target.data", f"zoo:{style}"] for style in ("fluent3d", "twemoji")}
CONFIGS = {"emoji": "adapt-domain/emoji-styles.yaml", "volumes": "adapt-domain/volumes.yaml"}


def volumes() -> dict[str, list[str]]:
    """Targets and their files."""
    found = importlib.util.find_spec("nilearn")
    if not DEBIAN.is_dir() or found is None or found.origin is None:
        raise SystemExit("needs `apt-get install mricron-data` and `pip install nilearn`")
    average = Path(found.origin).parent / "datasets" / "data"
    name = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
    macaque = [str(DEBIAN / "inia19-t1-brain.nii.gz"), str(DEBIAN / "inia19-NeuroMaps.nii.gz")]
    mni = [str(average / name.format("t1")), str(average / name.format("gm"))]
    return {
        target: ["--target.data", image, "--target.masks", mask]
        for target, (image, mask) in {"macaque": macaque, "mni152": mni}.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=CONFIGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/domain-shift"))
    parser.add_argument("--name", help="of the record; default: domain-shift-WHAT")
    parser.add_argument("--dry", action="store_true", help="write no record")
    a, flags = parser.parse_known_args()
    targets = EMOJI if a.what == "emoji" else volumes()
    reports: dict[str, list[dict]] = {target: [] for target in targets}
    for seed in a.seeds:
        weights: list[str] = []
        for target, data in targets.items():
            out = a.folder / f"{a.what}-{target}-{seed}"
            command = [
                "--config",
                CONFIGS[a.what],
                *data,
                "--seed",
                str(seed),
                "--output.folder",
                str(out),
                *flags,
                *weights,
            ]
            if adapt_domain.main([*command, "--output.resume"]):
                raise SystemExit(1)
            weights = weights or ["--model.weights", str(out / "model.safetensors")]
            reports[target].append(json.loads((out / "report.json").read_text()))
    figures: dict[str, Measurement] = {}
    lines = [f"{a.what}, seeds {a.seeds}"]
    for target, found in reports.items():
        for variant in found[0]["trials"]:
            for metric in found[0]["trials"][variant]["target"]:
                values = [report["trials"][variant]["target"][metric] for report in found]
                figures[f"{target}, {variant}, {metric}"] = over_seeds(values)
            trials = [report["trials"][variant] for report in found]
            verdicts = [trial.get("verdict", "-") for trial in trials]
            agrees = [round(trial["agreement"][trial["epoch"]], 3) for trial in trials]
            shown = ", ".join(f"{m} {figures[f'{target}, {variant}, {m}']}" for m in trials[0]["target"])
            lines.append(f"{target}, {variant}: {shown}; by seed: {', '.join(verdicts)}; agreement {agrees}")
        choices = [report["chosen_without_labels"] for report in found]
        lines.append(f"{target}: chosen without labels, by seed: {', '.join(choices)}")
    for metric in reports[next(iter(targets))][0]["source"]["figures"]:
        values = [report["source"]["figures"][metric] for report in reports[next(iter(targets))]]
        figures[f"source, {metric}"] = over_seeds(values)
        lines.append(f"source model on the source: {metric} {figures[f'source, {metric}']}")
    if any(report["target_figures_on_the_examples_adapted_to"] for report in found):
        lines.append("figures of the targets are taken on the slices that were adapted to (one volume a domain)")
    log = "\n".join(lines) + "\n"
    print(log, end="")
    if not a.dry:
        command = " ".join(["python benchmarks/domain_shift.py", a.what, "--seeds", *map(str, a.seeds), *flags])
        name = a.name or f"domain-shift-{a.what}"
        print(measure.write_record(name, figures, log=log, command=command, seed=a.seeds[0]))


def over_seeds(values: list[float]) -> Measurement:
    """The mean, and the range as the interval."""
    how = f"mean over seeds; interval: smallest and largest of {len(values)}"
    return Measurement(statistics.fmean(values), (min(values), max(values)), len(values), None, "share", how)


if __name__ == "__main__":
    main()
