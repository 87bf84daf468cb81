"""One HTML page of a report, with nothing from elsewhere; light and dark, wide and narrow."""

import html
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpar.config import Config, MeshConfig
from jaxpar.estimate.counts import describe_batch, parameter_count
from jaxpar.estimate.memory import PART_NAMES, human

_STYLE = Path(__file__).parents[1] / "assets" / "page.css"


def subject(
    module: str, arguments: Sequence[str], config: Config, mesh: MeshConfig | None = None
) -> dict[str, str]:
    """What a report is of, in words: its `command`, `config`, `model` and `batch`.

    Args:
      module: the command's, as `jaxpar.plan`; arguments: of its command line.
      config: the run.
      mesh: its mesh, where there is one.
    """
    command = shlex.join(["python", "-m", module, *arguments])
    file = re.search(r"--?config[= ](\S+)", command)
    m, precision = config.model, config.precision
    batch = describe_batch(config, mesh or MeshConfig())
    return {
        "command": command,
        "config": Path(file[1]).stem if file else "",
        "model": f"{parameter_count(m):,} parameters: {m.layers} layers, dim {m.dim:,}, {m.heads} "
        f"heads, {m.kv_heads} key-value heads, ffn {m.ffn_dim:,}, vocabulary {m.vocab_size:,}; "
        f"{precision.compute} with {precision.params} weights, {config.optimizer.name}",
        "batch": batch if mesh else batch.rpartition(" = ")[0],
    }


def explain_page(report: Mapping[str, Any], timetable: str = "") -> str:
    """The page of what `explain --json` writes; `timetable` is the drawing of a pipeline's, as
    SVG."""
    memory, asked = report["memory"], report["request"]
    devices = f"{report['devices']} x {html.escape(report['backend'])}"
    changes = [[_command(row["flags"]), human(row["peak"])] for row in report["remedies"]]
    warnings = "".join(f"<p>{html.escape(warning)}</p>" for warning in report["warnings"])
    compiled = (
        f"one device and one step, as compiled in {report['compile_seconds']:.0f} s; matmuls and "
        f"attention {report['flops'] / 1e12:,.2f} TFLOP"
    )
    return _page(
        f"{html.escape(asked['config'])}: one training step on {devices}",
        _facts(
            asked,
            devices=devices,
            mesh=_axes(report["mesh"]),
            attention=html.escape(report["attention"]),
            account=compiled,
        ),
        _verdict(report),
        _section("What would make it fit", _table(["change", "#peak"], changes)) if changes else "",
        _section("Warnings of the compiler", warnings) if warnings else "",
        _section(
            "Memory at its peak", stacked_bar(memory["parts"], memory["peak"], report["room"])
        ),
        _drawing("Timetable of the pipeline", timetable),
        _section("Collectives by axis", _traffic(report["collectives"])),
        _section("Parameters and optimizer state", _leaves(report["by_parameter"])),
        _section("Largest temporaries at the peak", _buffers(report["temporaries"])),
        _section("Every collective", _collectives(report["collectives"])),
    )


def _verdict(report: Mapping[str, Any]) -> str:
    peak, room = report["memory"]["peak"], report["room"]
    if room is None:
        return f'<p class="verdict">Peak {human(peak)}</p>'
    if report["fits"]:
        return f'<p class="verdict good"><b>Fits</b>: {human(peak)} of {human(room)}</p>'
    return (
        f'<p class="verdict bad"><b>Does not fit</b>: {human(peak)} of {human(room)}, '
        f"{human(peak - room)} too much</p>"
    )


def plan_page(report: Mapping[str, Any], timetable: str = "", most: int = 12) -> str:
    """The page of what `plan --json` writes: the best `most` meshes, the rest folded away;
    `timetable` is the drawing of the best pipeline, as SVG."""
    rows, asked = report["candidates"], report["request"]
    fitting = [row for row in rows if row["fits"]]
    others = [row for row in rows if not row["fits"]]
    devices = f"{report['devices']} x {html.escape(report['hardware'])}"
    shown = fitting[:most] or others[:most]
    longest = max((row["step_seconds"] for row in shown), default=1.0)

    def listed(rows: Sequence[Mapping[str, Any]]) -> str:
        items = "".join(_candidate(row, report["devices"], longest) for row in rows)
        return f'<ol class="cards">{items}</ol>'

    best_section = ""
    if fitting:
        best = fitting[0]
        parts = {name: best["memory"].get(name, 0) for name in PART_NAMES}
        best_section = _section(
            "The best",
            f"<p>{_command(best['flags'])}</p>" + stacked_bar(parts, sum(parts.values()), None),
        )
    folded = [
        (f"{len(fitting) - most} more that fit", fitting[most : 5 * most]),
        (f"{len(others)} that do not fit", others[: 2 * most] if fitting else others[most:]),
    ]
    verdict = (
        f'<p class="verdict good"><b>{len(fitting)} of {len(rows)}</b> legal meshes fit</p>'
        if fitting
        else f'<p class="verdict bad"><b>None of {len(rows)}</b> legal meshes fits</p>'
    )
    return _page(
        f"{html.escape(asked['config'])}: ways to run on {devices}",
        _facts(
            asked,
            devices=devices,
            account="predictions by arithmetic, of one device and one step",
        ),
        verdict,
        best_section,
        _section(
            "The fastest first" if fitting else "The smallest first",
            _legend({name: _color(name) for name in _times(shown)}) + listed(shown),
            *(_fold(title, listed(rows)) for title, rows in folded if rows),
        ),
        _drawing(f"Timetable of {html.escape(report['pipelined'])}", timetable),
    )  # fmt: skip


def _candidate(row: Mapping[str, Any], devices: int, longest: float) -> str:
    """A card: mesh, settings, figures, where the time goes, and why."""
    count, tone = row["microbatches"], "good" if row["fits"] else "bad"
    settings = [f"{count} microbatch{'es' * (count > 1)}", f"remat {row['remat']}"]
    if row["schedule"]:
        settings.append(f"{row['schedule']}, {row['chunks']} chunk{'s' * (row['chunks'] > 1)}")
    compiled = " compiled" if row["verified"] else ""
    figures = {
        f"peak{compiled}": f'<span class="{tone}">{human(row["memory"]["total"])}</span>',
        "a step": f"{row['step_seconds']:.3g} s",
        "tokens/s a GPU": f"{row['tokens_per_second'] / devices:,.0f}",
        "MFU": f"{row['mfu']:.1%}",
    }
    told = "".join(f"<span><b>{value}</b> {name}</span>" for name, value in figures.items())
    spans = "".join(
        _span(seconds / longest, _color(name), f"{name}: {seconds:.3g} s")
        for name, seconds in _seconds(row).items()
    )
    return (
        f'<li><div class="mesh"><b>{_axes(row["mesh"])}</b> <span class="soft">'
        f'{html.escape(", ".join(settings))}</span></div><div class="figures">{told}</div>'
        f'<div class="bar thin">{spans}</div><p class="why">{html.escape(row["reason"])}</p></li>'
    )


def _seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """Where the time of a step goes."""
    time = row["time"]
    parts = {"matmuls": time["matmul"], "attention": time["attention"]}
    parts["memory traffic"] = time["memory"]
    parts |= {f"waiting for {axes}": seconds for axes, seconds in time["exposed"].items()}
    return parts | {"idle stages": time["bubble"]}


def _times(rows: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """The parts of time that are to be seen in bars, each once."""
    seen = dict.fromkeys(name for row in rows for name in _seconds(row))
    return {
        name: None
        for name in seen
        if any(_seconds(row).get(name, 0) > 0.003 * row["step_seconds"] for row in rows)
    }


_KINDS = ("matmuls", "attention", "memory traffic", "fsdp", "tensor", "sequence", "data")


def _color(name: str) -> str:
    """The same for the same part of a step in every bar."""
    last = name.removeprefix("waiting for ")
    number = 8 if name == "idle stages" else _KINDS.index(last) if last in _KINDS else 7
    return f"var(--c{number})"


def stacked_bar(parts: Mapping[str, int], peak: int, room: int | None) -> str:
    """A bar as wide as what there is (or as the peak, if that is more), and its legend."""
    whole = max(peak, room or 0, 1)
    spans, colors, sizes = [], {}, {}
    for number, (name, size) in enumerate(parts.items()):
        if size > 0:
            words = PART_NAMES[name]
            colors[words], sizes[words] = f"var(--c{number % 10})", human(size)
            spans.append(_span(size / whole, colors[words], f"{words}: {human(size)}"))
    if room and peak < room:
        colors["free"], sizes["free"] = "var(--line)", human(room - peak)
    bar = f'<div class="bar" role="img" aria-label="memory">{"".join(spans)}</div>'
    return bar + _legend(colors, sizes)


def _legend(colors: Mapping[str, str], figures: Mapping[str, str] | None = None) -> str:
    items = "".join(
        f'<li><i style="background:{color}"></i>{html.escape(name)}'
        + (f" <b>{figures[name]}</b>" if figures else "")
        + "</li>"
        for name, color in colors.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _span(share: float, color: str, title: str) -> str:
    return f'<span style="width:{100 * share:.2f}%;background:{color}" title="{title}"></span>'


def _traffic(collectives: Sequence[Mapping[str, Any]]) -> str:
    sums: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for row in collectives:
        name = "+".join(row["axes"])
        axes = sums.setdefault(name, {})
        axes[row["op"]] = axes.get(row["op"], 0) + row["bytes"]
        seconds[name] = seconds.get(name, 0) + (row["seconds"] or 0)
    if not sums:
        return "<p>none</p>"
    most = max(sum(ops.values()) for ops in sums.values())
    operations = sorted({row["op"] for row in collectives})
    colors = {op: f"var(--c{number})" for number, op in enumerate(operations)}
    lines = []
    for axes, ops in sorted(sums.items(), key=lambda item: -sum(item[1].values())):
        spans = "".join(
            _span(size / most, colors[op], f"{op}: {human(size)}") for op, size in ops.items()
        )
        time = f", {1e3 * seconds[axes]:,.1f} ms at link speed" if seconds[axes] else ""
        told = f"<p><b>{axes}</b> {human(sum(ops.values()))}{time}</p>"
        lines.append(f'{told}<div class="bar thin">{spans}</div>')
    return "".join(lines) + _legend(colors)


def _leaves(leaves: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"<code>{html.escape(leaf['name'])}</code>",
            " x ".join(map(str, leaf["shape"])),
            leaf["dtype"],
            f"<code>{html.escape(_plain(leaf['sharding']))}</code>",
            human(leaf["bytes_per_device"]),
        ]
        for leaf in sorted(leaves, key=lambda leaf: -leaf["bytes_per_device"])
    ]
    return _table(["leaf", "shape", "dtype", "sharding", "#on a device"], rows)


def _plain(spec: str) -> str:
    """A PartitionSpec without its name and quotes."""
    return spec.removeprefix("PartitionSpec").replace("'", "")


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
    head = ["collective", "axes", "dtype", "#times", "#bytes in all", "#ms", "async", "made by"]
    return _table(head, rows)


def _axes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], most: int = 12) -> str:
    """Cells are HTML; a column whose name begins with # holds numbers. On a narrow page a row is a
    block of its cells. Rows beyond `most` are folded away."""
    names = [name.lstrip("#") for name in head]
    kinds = [' class="n"' if name.startswith("#") else "" for name in head]
    top = "".join(f"<th{kind}>{name}</th>" for kind, name in zip(kinds, names, strict=True))

    def body(rows: Sequence[Sequence[str]]) -> str:
        lines = (
            "".join(
                f'<td{kind} data-name="{name}">{cell}</td>'
                for kind, name, cell in zip(kinds, names, row, strict=True)
            )
            for row in rows
        )
        inner = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{inner}</tbody></table>"

    more = _fold(f"{len(rows) - most} more", body(rows[most:])) if len(rows) > most else ""
    return body(rows[:most]) + more


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _facts(asked: Mapping[str, str], **more: str) -> str:
    """What the report is of, as a list of names and values."""
    values = {
        "model": html.escape(asked["model"]),
        **more,
        "batch": html.escape(asked["batch"]),
        "command": _command(asked["command"]),
    }
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in values.items() if value)
    return f"<dl>{items}</dl>"


def _command(text: str) -> str:
    """A command line that breaks between its flags only, where it can."""
    words = " ".join(f"<span>{html.escape(word)}</span>" for word in text.split(" "))
    return f"<code>{words}</code>"


def _drawing(title: str, drawing: str) -> str:
    return _section(title, f'<div class="scroll">{drawing}</div>') if drawing else ""


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(content)}</section>"


def _page(title: str, *sections: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE.read_text()}</style></head><body><h1>{title}</h1>"
        f"{''.join(sections)}</body></html>\n"
    )
