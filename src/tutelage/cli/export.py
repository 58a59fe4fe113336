"""`tutelage export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli import figures
from tutelage.cli.complete import export_formats
from tutelage.cli.output import AsJson, kept_for_json, print_json, print_table, say


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="Formats, with commas between: safetensors, torch, onnx, int8, int4, onnx-int8.",
            autocompletion=export_formats,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--dir", help="Folder; left out: export in the run's folder.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Upload it too, such as me/my-student; asks first.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before an upload.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the student of a run to deploy it, with a model card. Each file is held against the student on real rows;
    where one answers otherwise nothing is written.

    \b
    Examples
      tutelage export runs/digits-kd-0 --to safetensors
      tutelage export runs/digits-kd-0 --to onnx,onnx-int8 --dir deploy
      tutelage export runs/digits-kd-0 --to safetensors --push-to-hub me/my-student
    """
    with kept_for_json(as_json):
        from tutelage.export import hub
        from tutelage.export.run import export_run

        if push_to_hub is not None:
            hub.check_name(push_to_hub)
        done = export_run(folder, [name.strip() for name in to.split(",")], out=out)
        if not as_json:
            _print(done)
        if push_to_hub is not None:
            done["address"] = _upload(Path(done["folder"]), push_to_hub, yes)
    if as_json:
        print_json(done)


def _upload(folder: Path, name: str, yes: bool) -> str | None:
    from tutelage.export import hub

    files = hub.uploads(folder)
    say(f"to upload to {name}:")
    for file, size in files.items():
        say(f"  {file}  {size:,} bytes")
    if not yes and not typer.confirm(f"Upload {len(files)} files, {sum(files.values()):,} bytes?"):
        say("nothing was uploaded")
        return None
    address = hub.push(folder, name)
    say(f"uploaded {address}")
    return address


def _print(done: dict[str, Any]) -> None:
    rows, before = [], done["float_metrics"]
    name = next(iter(before), None)
    for title, entry in done["formats"].items():
        check, shares = entry["check"], entry.get("quantised") or {}
        after = (entry.get("metrics") or {}).get(name)
        rows.append(
            [
                title,
                ", ".join(entry["files"]),
                f"{entry['bytes']:,}",
                f"{check['largest_difference']:.2g}",
                "-" if check.get("agreement") is None else f"{100 * check['agreement']:.1f} %",
                f"{100 * shares['parameters']:.1f} %, {100 * shares['flops']:.1f} %" if shares else "-",
                f"{figures.metric(name, before[name])} → {figures.metric(name, after)}"
                if name and shares
                else "-",
            ]
        )
    first = next(iter(done["formats"].values()))
    columns = [
        "",
        "files",
        "bytes",
        "difference",
        "same answer",
        "quantised",
        f"{done['split']} {name or ''}",
    ]
    title = (
        f"Checked on {first['checked_on']}; the student's float weights are {done['student_bytes']:,} bytes"
    )
    print_table(columns, rows, title=title, right=columns[2:])
    for title, entry in done["formats"].items():
        if left := (entry.get("quantised") or {}).get("left"):
            say(f"{title}: floats stay in {', '.join(left)}")
        if "quantised" in entry and entry["bytes"] >= done["student_bytes"]:
            say(f"{title}: the file is not smaller; so small a model is mostly graph")
    say(f"card     {Path(done['folder']) / 'README.md'}")
