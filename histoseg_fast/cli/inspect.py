"""`histoseg-fast inspect`: what a plan holds."""

from __future__ import annotations

import json

import typer

from histoseg_fast.errors import one_line

NAME = "inspect"
SCORES = {"cross_entropy": "cross entropy", "pixel_accuracy": "accuracy", "mean_iou": "mIoU", "images": "images"}


def command(
    plan: str = typer.Argument("fast", metavar="PLAN", help="A plan file, or a shipped plan's name."),
    as_json: bool = typer.Option(False, "--json", help="Print the manifest as JSON."),
) -> None:
    """Verify a plan and show what it holds: network, classes, precisions, scores, members."""
    from histoseg_fast.engines import choose_precision
    from histoseg_fast.plans import open_plan

    opened = open_plan(plan)
    manifest = opened.manifest
    here = choose_precision(opened, "auto")
    if as_json:
        print(json.dumps({**manifest, "sha256": opened.sha256, "precision_here": here}, indent=1))
        return
    classes = ", ".join(f"{i} {c['name']} {tuple(c['colour'])}" for i, c in enumerate(manifest["classes"]))
    agreements = ", ".join(
        f"{name} ({values['agreement']:.2%} of pixels as fp32)" if name != "fp32" else name
        for name, values in manifest["precisions"].items()
        if values.get("agreement") is not None
    )
    rows = [
        ("plan", f"{opened.path}, sha256 {opened.sha256}"),
        ("network", f"{manifest['arch']}, stride {opened.stride}, halo {opened.halo}, tile {opened.tile} pixels"),
        ("trained at", "not recorded" if opened.mpp is None else f"{opened.mpp:g} micrometres a pixel"),
        ("classes", classes),
        ("precisions", f"{agreements}; here --precision auto runs {here}"),
        ("postprocess", str(opened.postprocess)),
        ("members", ", ".join(f"{name} {m['bytes'] / 2**20:.1f} MiB" for name, m in manifest["members"].items())),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest["made_with"].items())),
    ]
    for split, scores in manifest["scores"].items():
        if isinstance(scores, dict):
            shown = [f"{name} {_value(scores[key])}" for key, name in SCORES.items() if key in scores]
            rows.append((f"scores, {split}", ", ".join(shown)))
    for name, value in rows:
        print(f"{one_line(name):<14} {one_line(value)}")


def _value(score: object) -> str:
    """A score as it stands in the manifest, where nothing but the plan's maker vouches for it."""
    return f"{score:.4f}" if isinstance(score, float) else "-" if score is None else str(score)[:40]
