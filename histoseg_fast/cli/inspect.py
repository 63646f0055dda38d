"""`histoseg-fast inspect`: what a plan holds."""

from __future__ import annotations

import json

import typer

NAME = "inspect"


def command(
    plan: str = typer.Argument("final", metavar="PLAN", help="A plan file, or a shipped plan's name."),
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
        ("classes", classes),
        ("precisions", f"{agreements}; here --precision auto runs {here}"),
        ("members", ", ".join(f"{name} {m['bytes'] / 2**20:.1f} MiB" for name, m in manifest["members"].items())),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest["made_with"].items())),
    ]
    for split, scores in manifest["scores"].items():
        if isinstance(scores, dict) and "mean_iou" in scores:
            rows.append(
                (
                    f"scores, {split}",
                    f"cross entropy {scores['cross_entropy']:.4f}, accuracy {scores['pixel_accuracy']:.4f}, "
                    f"mIoU {scores['mean_iou']:.4f} on {scores['images']} images",
                )
            )
    for name, value in rows:
        print(f"{name:<14} {value}")
