"""One HTML page of a report, with nothing from elsewhere; light and dark, wide and narrow."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpar.estimate.memory import PART_NAMES, human

_STYLE = Path(__file__).parents[1] / "assets" / "page.css"


def explain_page(report: Mapping[str, Any], timetable: str = "") -> str:
    """The page of what `explain --json` writes; `timetable` is the drawing of a pipeline's, as
    SVG."""
    memory = report["memory"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items()) or "one device"
    verdict = ""
    if report["fits"] is not None:
        word = "fits" if report["fits"] else "does not fit"
        tone = "good" if report["fits"] else "bad"
        verdict = f'<b class="{tone}">{word}</b>: peak {human(memory["peak"])} of {human(report["room"])}. '
    changes = [
        [f"<code>{html.escape(row['flags'])}</code>", human(row["peak"])]
        for row in report["remedies"]
    ]
    warnings = "".join(f"<p>{html.escape(warning)}</p>" for warning in report["warnings"])
    return _page(
        f"One training step on {report['devices']} x {html.escape(report['backend'])}",
        f"mesh {mesh}. {verdict}Everything is of one device and one step, as compiled.",
        _section("What would make it fit", _table(["change", "#peak"], changes)) if changes else "",
        _section("Warnings of the compiler", warnings) if warnings else "",
        _section(
            "Memory at its peak", stacked_bar(memory["parts"], memory["peak"], report["room"])
        ),
        _section("Timetable of the pipeline", f'<div class="scroll">{timetable}</div>')
        if timetable
        else "",
        _section("Collectives by axis", _traffic(report["collectives"])),
        _section("Parameters and optimizer state", _leaves(report["by_parameter"])),
        _section("Largest temporaries at the peak", _buffers(report["temporaries"])),
        _section("Every collective", _collectives(report["collectives"])),
        f'<p class="soft">matmuls and attention: {report["flops"] / 1e12:,.2f} TFLOP; compiled in '
        f"{report['compile_seconds']:.0f} s</p>",
    )


def plan_page(report: Mapping[str, Any], timetable: str = "", most: int = 40) -> str:
    """The page of what `plan --json` writes; `timetable` is the drawing of the best pipeline, as
    SVG."""
    rows = report["candidates"]
    fitting = [row for row in rows if row["fits"]]
    shown = [
        *fitting[:most],
        *[row for row in rows if not row["fits"]][: max(8, most - len(fitting))],
    ]
    best = fitting[0] if fitting else None
    table = [
        [
            _axes(row["mesh"]),
            str(row["microbatches"]),
            row["remat"],
            f'<span class="{"good" if row["fits"] else "bad"}">{human(row["memory"]["total"])}</span>'
            + (" compiled" if row["verified"] else ""),
            f"{row['step_seconds']:.3g}",
            f"{row['tokens_per_second'] / report['devices']:,.0f}",
            f"{row['mfu']:.1%}",
            html.escape(row["reason"]),
        ]
        for row in shown
    ]
    best_section = ""
    if best:
        sizes = {
            name: size for name, size in best["memory"].items() if name not in ("total", "reserve")
        }
        bar = stacked_bar(sizes, sum(sizes.values()), None)
        best_section = _section(
            "The best", f"<p><code>{html.escape(best['flags'])}</code></p>{bar}"
        )
    return _page(
        f"{report['devices']} x {html.escape(report['hardware'])}: {len(fitting)} of {len(rows)} "
        "meshes fit",
        "Predictions by arithmetic, of one device and one step, the fastest first.",
        best_section,
        _section("Time of a step, seconds", "".join(map(_time_bar(shown), shown[:12]))),
        _section(f"Timetable of {report['pipelined']}", f'<div class="scroll">{timetable}</div>') if timetable else "",
        _section(
            "Meshes",
            _table(["mesh", "#microbatches", "remat", "#peak", "#step s", "#tokens/s a GPU", "#MFU", "why"], table),
        ),
    )  # fmt: skip


def stacked_bar(parts: Mapping[str, int], peak: int, room: int | None) -> str:
    """A bar as wide as what there is (or as the peak, if that is more), and its legend."""
    whole = max(peak, room or 0)
    spans, legend = [], []
    for number, (name, size) in enumerate(parts.items()):
        if size > 0:
            color, words = f"var(--c{number % 10})", html.escape(PART_NAMES[name])
            spans.append(_span(size / whole, color, f"{words}: {human(size)}"))
            legend.append(
                f'<li><i style="background:{color}"></i>{words} <b>{human(size)}</b></li>'
            )
    if room and peak < room:
        legend.append(
            f'<li><i style="background:var(--line)"></i>free <b>{human(room - peak)}</b></li>'
        )
    over = f'<p class="bad">{human(peak - room)} too much</p>' if room and peak > room else ""
    bar = f'<div class="bar" role="img" aria-label="memory">{"".join(spans)}</div>'
    return f'{bar}{over}<ul class="legend">{"".join(legend)}</ul>'


def _span(share: float, color: str, title: str) -> str:
    return f'<span style="width:{100 * share:.2f}%;background:{color}" title="{title}"></span>'


def _traffic(collectives: Sequence[Mapping[str, Any]]) -> str:
    sums: dict[str, dict[str, float]] = {}
    for row in collectives:
        axes = sums.setdefault("+".join(row["axes"]), {})
        axes[row["op"]] = axes.get(row["op"], 0) + row["bytes"]
    if not sums:
        return "<p>none</p>"
    most = max(sum(ops.values()) for ops in sums.values())
    operations = sorted({row["op"] for row in collectives})
    colors = {op: f"var(--c{number})" for number, op in enumerate(operations)}
    seconds = {
        axes: sum(r["seconds"] or 0 for r in collectives if "+".join(r["axes"]) == axes)
        for axes in sums
    }
    lines = []
    for axes, ops in sorted(sums.items(), key=lambda item: -sum(item[1].values())):
        spans = "".join(
            _span(size / most, colors[op], f"{op}: {human(size)}") for op, size in ops.items()
        )
        time = f", {1e3 * seconds[axes]:,.1f} ms at link speed" if seconds[axes] else ""
        told = f"{human(sum(ops.values()))}{time}"
        lines.append(
            f'<p><b>{axes}</b> <span class="soft">{told}</span></p><div class="bar thin">{spans}</div>'
        )
    legend = "".join(
        f'<li><i style="background:{color}"></i>{op}</li>' for op, color in colors.items()
    )
    return "".join(lines) + f'<ul class="legend">{legend}</ul>'


def _leaves(leaves: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"<code>{html.escape(leaf['name'])}</code>",
            " x ".join(map(str, leaf["shape"])),
            leaf["dtype"],
            f"<code>{html.escape(leaf['sharding'])}</code>",
            human(leaf["bytes_per_device"]),
        ]
        for leaf in sorted(leaves, key=lambda leaf: -leaf["bytes_per_device"])
    ]
    return _table(["leaf", "shape", "~dtype", "sharding", "#on a device"], rows)


def _buffers(buffers: Sequence[Mapping[str, Any]], most: int = 25) -> str:
    rows = [
        [
            f"<code>{html.escape(row['shape'])}</code>",
            PART_NAMES[row["part"]],
            html.escape(row["source"] or row["operation"] or "the compiler"),
            human(row["bytes"]),
        ]
        for row in buffers[:most]
    ]
    return _table(["array", "for", "made by", "#bytes"], rows)


def _collectives(collectives: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            row["op"],
            "+".join(row["axes"]),
            row["dtype"],
            f"{row['count']:,}",
            human(row["bytes"]),
            "" if row["seconds"] is None else f"{1e3 * row['seconds']:.2f}",
            "yes" if row["asynchronous"] else "no",
            html.escape(f"{row['source'] or 'the compiler'} ({row['phase']})"),
        ]
        for row in collectives
    ]
    return _table(
        ["collective", "axes", "dtype", "#times", "#bytes in all", "#ms", "~async", "made by"], rows
    )


def _time_bar(rows: Sequence[Mapping[str, Any]]):
    longest = max((row["step_seconds"] for row in rows[:12]), default=1.0)

    def line(row: Mapping[str, Any]) -> str:
        time = row["time"]
        parts = {
            "matmuls": time["matmul"],
            "attention": time["attention"],
            "memory traffic": time["memory"],
        }
        parts |= {f"waiting for {axes}": seconds for axes, seconds in time["exposed"].items()}
        parts["idle stages"] = time["bubble"]
        spans = "".join(
            _span(s / longest, f"var(--c{_color(name)})", f"{name}: {s:.3f} s")
            for name, s in parts.items()
        )
        told = ", ".join(
            f"{name} {s:.3g}" for name, s in parts.items() if s > 0.005 * row["step_seconds"]
        )
        return f'<p><b>{_axes(row["mesh"])}</b> <span class="soft">{told}</span></p><div class="bar thin">{spans}</div>'

    return line


def _color(name: str) -> int:
    """The same for the same part of a step in every bar."""
    order = (
        "matmuls",
        "attention",
        "memory traffic",
        "fsdp",
        "tensor",
        "sequence",
        "data",
        "idle stages",
    )
    last = name.removeprefix("waiting for ")
    return order.index(last) if last in order else len(order)


def _axes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML. A column whose name begins with # holds numbers; one with ~ is left out on a
    narrow page."""
    kinds = [
        ' class="n"' if name.startswith("#") else ' class="wide"' if name.startswith("~") else ""
        for name in head
    ]
    top = "".join(
        f"<th{kind}>{name.lstrip('#~')}</th>" for kind, name in zip(kinds, head, strict=True)
    )
    lines = (
        "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _page(title: str, lead: str, *sections: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE.read_text()}</style></head><body><h1>{title}</h1>"
        f'<p class="soft">{lead}</p>{"".join(sections)}</body></html>\n'
    )
