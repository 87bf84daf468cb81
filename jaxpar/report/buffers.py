"""What fills the memory of a device at the moment of a step at which it holds the most: from XLA's
dumps of where it puts every array and how long each lives."""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping

from jaxpar.report import hlo
from jaxpar.report.dataflow import Graph, Line, Value


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A stretch of temporary memory that is in use at the peak. `shape` is that of the array in it,
    `source` the line that made it, `operation` jax's name for what did, `part` one of
    `memory.PART_NAMES`."""

    shape: str
    bytes: int
    source: str
    operation: str
    part: str


@dataclasses.dataclass(frozen=True)
class _Place:
    arena: int
    offset: int
    size: int


def at_peak(assignment: str, live_ranges: str, text: str) -> list[Buffer]:
    """The buffers of temporary memory in use when most of it is, largest first. They do not
    overlap: what shares memory is there once, and what lies in arguments, donated ones too, is not.

    Args:
      assignment: XLA's dump `*-buffer-assignment.txt`: where every array lies.
      live_ranges: XLA's dump `*-live-range.txt`: from when to when it does.
      text: the module's text.
    """
    places, ranges = _places(assignment), _ranges(live_ranges)
    graph, source = Graph(text), hlo.Sources(text)
    moment = _fullest(places, ranges)
    living = {
        value: place
        for value, place in places.items()
        if value in ranges and ranges[value][0] <= moment <= ranges[value][1]
    }
    buffers, taken = [], defaultdict(list)
    outside = _wrapped(live_ranges, graph)
    # Of values that share memory the last one says most about it.
    for value, place in sorted(
        living.items(),
        key=lambda item: (-item[1].size, -ranges[item[0]][0]),
    ):
        free = _free(place, taken[place.arena])
        if free:
            taken[place.arena].append((place.offset, place.offset + place.size))
            name, index = value
            if name in outside:
                value = outside[name], (1, *index)
            buffers.append(_buffer(graph, source, value, free))
    return sorted(buffers, key=lambda buffer: -buffer.bytes)


def _places(assignment: str) -> dict[Value, _Place]:
    """Where values lie that lie in temporary memory of the device."""
    places, arena, temporary = {}, 0, False
    for line in assignment.splitlines():
        if head := re.match(r"allocation (\d+): size \d+, ?(.*)", line):
            arena = int(head[1])
            temporary = not re.search(r"parameter|maybe-live-out|constant|thread-local", head[2])
            temporary &= "color 5" not in head[2]  # pinned memory of the host
        elif temporary and (
            value := re.match(
                r" *value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> "
                r"\(size=(\d+),offset=(\d+)\)",
                line,
            )
        ):
            places[value[1], _index(value[2])] = _Place(arena, int(value[4]), int(value[3]))
        elif not line.startswith(" "):
            temporary = False
    return places


def _ranges(live_ranges: str) -> dict[Value, tuple[int, int]]:
    """First and last moment of every value; moments are places in the schedule."""
    listed = live_ranges.partition("BufferLiveRange:\n")[2]
    return {
        (name, _index(index)): (int(begin), int(end))
        for name, index, begin, end in re.findall(
            r"^ +([\w.\-]+)\{([\d,]*)\}:(\d+)-(\d+)$", listed, re.M
        )
    }


def _wrapped(live_ranges: str, graph: Graph) -> dict[str, str]:
    """Instructions inside asynchronous ones, which XLA's text leaves out, and the start that
    follows each in the schedule: its result 1 is theirs."""
    names = re.findall(r"^ +\d+:([\w.\-]+)$", live_ranges, re.M)
    return {
        name: following
        for name, following in itertools.pairwise(names)
        if name not in graph.lines and following in graph.lines
    }


def _index(text: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in (text or "").split(",") if n)


def _fullest(places: Mapping[Value, _Place], ranges: Mapping[Value, tuple[int, int]]) -> int:
    """The moment at which most of the temporary memory is in use. XLA's own peak counts results in
    donated arguments, for which no memory is needed, and so may be another."""
    events = defaultdict(list)
    for value, place in places.items():
        if value in ranges:
            events[ranges[value][0]].append((place, 1))
            events[ranges[value][1] + 1].append((place, -1))
    count: dict[_Place, int] = defaultdict(int)
    best, moment, used = -1, 0, 0
    for time in sorted(events):
        for place, change in events[time]:
            before = count[place]
            count[place] += change
            used += place.size * ((count[place] > 0) - (before > 0))
        if used > best:
            best, moment = used, time
    return moment


def _free(place: _Place, taken: list[tuple[int, int]]) -> int:
    """Bytes of a place that no other value has taken."""
    free, at, end = 0, place.offset, place.offset + place.size
    for begin, stop in sorted(taken):
        if stop <= at:
            continue
        free += max(0, min(begin, end) - at)
        at = max(at, stop)
        if at >= end:
            break
    return free + max(0, end - at)


def _buffer(graph: Graph, source: hlo.Sources, value: Value, size: int) -> Buffer:
    own, maker = graph.lines.get(value[0]), graph.maker(value)
    if own is None or maker is None:
        return Buffer("", size, "", "", "working")
    told = next(
        filter(None, (_told(graph, source, value) for value in graph.history(maker))),
        graph.lines[maker[0]],
    )
    part = _part(graph, source, maker)
    return Buffer(_shape(own, value[1]), size, source.of(told.rest), told.op_name, part)


def _told(graph: Graph, source: hlo.Sources, value: Value) -> Line | None:
    """The instruction of a value, or inside of it, of which the source is known."""
    return next((line for line in graph.written(value) if source.of(line.rest)), None)


def _shape(line: Line, index: tuple[int, ...]) -> str:
    """Of the array at a place of a result: `((a, b), c)`, (0, 1) -> b."""
    text = line.result
    for place in index:
        parts, depth = [""], 0
        for letter in text.strip()[1:-1]:
            depth += (letter in "([{") - (letter in ")]}")
            if letter == "," and not depth:
                parts.append("")
            else:
                parts[-1] += letter
        text = parts[place] if place < len(parts) else ""
    parsed = hlo.arrays(text)
    return str(parsed[0]) if len(parsed) == 1 else ""


_STACKS = {"sum": "gradients", "result": "gradients", "queue": "activations", "kept": "activations"}


def _part(graph: Graph, source: hlo.Sources, maker: Value) -> str:
    """What a value is for, from what made it and how it is read; never from its shape, which two
    things may share."""
    if leaves := graph.copied(maker):
        if all(leaf.startswith("state.model.") for leaf in leaves):
            ends = any(re.search(r"\.(embedding|head)\b", leaf) for leaf in leaves)
            return "logits" if ends else "weights"
        return "gradients" if any(leaf.startswith("state.") for leaf in leaves) else "batch"
    for value in graph.history(maker):
        told = _told(graph, source, value)
        files = source.files(told.rest) if told else set()
        if files & _ENDS:
            return "logits"
        if stack := graph.stack(value):
            part, line = _STACKS[stack], source.of(told.rest) if told else ""
            return "stash" if part == "activations" and line.startswith(_STAGES) else part
        if files & _UPDATE or (files and files <= _AROUND):
            return "gradients"
        if files and not graph.moved(value):
            break
    return "working"


_STAGES = "parallel/pipeline.py"
"""Where what waits between the ticks of a pipeline is put away."""
_ENDS = {"loss.py", "parallel/vocabulary.py"}
_UPDATE = {"optimizer.py"}
_AROUND = {"step.py", "compile.py", "report/account.py", "parallel/reduce.py"}
"""Files of this package that make logits and what is read from the embedding; that update; and that
stand around both and the layers."""
