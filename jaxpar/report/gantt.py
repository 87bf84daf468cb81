"""The picture of a pipeline's timetable, as SVG."""

from jaxpar.parallel.timetable import Timetable, Work, describe, timetable

_FORWARD, _BACKWARD = (
    ("#c6dbef", "#6baed6", "#2171b5", "#08306b"),
    ("#fdd0a2", "#fd8d3c", "#d94801", "#7f2704"),
)


def svg(timetable: Timetable, title: str = "") -> str:
    """A Gantt chart: one row a stage, time to the right, forward passes blue and backward passes,
    twice as long, orange; darker in later chunks. The number is the microbatch."""
    unit, height, left, top = 16, 26, 62, 46
    parts, x = [], left
    for tick in timetable.ticks:
        for works, width, colours in ((tick.forward, 1, _FORWARD), (tick.backward, 2, _BACKWARD)):
            if not any(works):
                continue
            for stage, work in enumerate(works):
                if work:
                    parts.append(_box(x, top + stage * height, width * unit, height, work, colours))
            x += width * unit
    bottom = top + timetable.stages * height
    stages = range(timetable.stages)
    labels = [
        _text(left - 8, top + (stage + 0.65) * height, f"stage {stage}", anchor="end")
        for stage in stages
    ]
    head = [
        _text(left, 16, title or "pipeline", weight="bold"),
        _text(left, 34, describe(timetable)),
    ]
    size = f'width="{max(x + 12, 640)}" height="{bottom + 12}"'
    ground = f'x="{left}" y="{top}" width="{x - left}" height="{bottom - top}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="timetable" {size} {_FONT}>',
            f"<style>{_STYLE}</style>",
            '<rect width="100%" height="100%" class="page"/>',
            f'<rect {ground} class="idle"/>',
            *head,
            *labels,
            *parts,
            "</svg>\n",
        ]
    )


_FONT = 'font-family="sans-serif" font-size="11"'
_STYLE = (
    ".timetable .page { fill: #ffffff } .timetable .idle { fill: #eeeeee } "
    ".timetable .ink { fill: #1c1c1a } "
    "@media (prefers-color-scheme: dark) { .timetable .page { fill: #1f201f } "
    ".timetable .idle { fill: #373835 } .timetable .ink { fill: #ececea } }"
)
"""Colours of the ground and of what is written on it, light and dark, in a page and alone."""


MOST = 64
"""Microbatches that a picture has at most."""


def picture(schedule: str, stages: int, microbatches: int, chunks: int = 1) -> str:
    """The Gantt chart of a run, of its first microbatches where they are many."""
    whole = timetable(schedule, stages, microbatches, chunks)
    if microbatches <= MOST:
        return svg(whole, schedule)
    few = max(stages, MOST // stages * stages)
    drawn = timetable(schedule, stages, few, chunks)
    return svg(
        drawn,
        f"{schedule}, drawn with {few} of {microbatches} microbatches; with all: bubble "
        f"{whole.bubble:.1%}",
    )


def _box(x: int, y: int, width: int, height: int, work: Work, colours: tuple[str, ...]) -> str:
    shade = min(work.chunk, len(colours) - 1)
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    ink = 'fill="white"' if shade > 1 else 'fill="black"'
    middle = x + width / 2, y + 0.65 * height
    return f'<rect {place} fill="{colours[shade]}" stroke="white"/>' + _text(
        *middle, str(work.microbatch), anchor="middle", ink=ink, size=9
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    ink: str = 'class="ink"',
    size: int = 11,
    weight: str = "normal",
) -> str:
    font = f'font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {ink} {font}>{text}</text>'
