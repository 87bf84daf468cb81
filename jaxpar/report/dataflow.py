"""Follows arrays through compiled HLO: which instruction made one, of which arguments it is a copy,
and how a stack that a loop writes is read.

A value is an instruction and the place in its result, () of an array: ("while.3", (11,)).
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator

from jaxpar.report import hlo

Value = tuple[str, tuple[int, ...]]

_VIEWS = {"bitcast", "copy", "copy-start", "copy-done", "optimization-barrier"}
"""Operations whose result is what they are given."""
_MOVES = _VIEWS | {
    *("convert", "transpose", "reshape", "slice", "dynamic-slice", "concatenate", "pad"),
    *("all-gather", "all-gather-start", "all-gather-done", "reduce-precision", "async-done"),
}
"""Operations whose result is their first operand, moved, cut or cast, or several of them."""


_CARRIES = _MOVES | {"reduce-scatter", "all-reduce", "all-gather"}
"""The same, and sums over devices."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction, where it stands, and the text after its opening parenthesis."""

    computation: str
    name: str
    result: str
    operation: str
    rest: str

    @property
    def op_name(self) -> str:
        """jax's name for what it computes; of an argument the path of the leaf."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def operands(self) -> list[str]:
        return hlo.operands_of(self.rest)

    @property
    def called(self) -> list[str]:
        """Computations that it calls; of a loop the body alone."""
        if self.operation == "while":
            return re.findall(r"body=%?([\w.\-]+)", self.rest)
        if self.operation == "conditional":
            return hlo.branches_of(self.rest)
        return re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", self.rest)


class Graph:
    """The instructions of a compiled module, and how values flow between them."""

    def __init__(self, text: str):
        self.lines: dict[str, Line] = {}
        self.entry = ""
        self._roots: dict[str, str] = {}
        self._bodies: dict[str, list[Line]] = defaultdict(list)
        self._callers: dict[str, Line] = {}
        self._parameters: dict[tuple[str, int], str] = {}
        self._users: dict[str, list[str]] = defaultdict(list)
        computations, self.entry = hlo.computations_of(text)
        for computation, body in computations.items():
            for text_line in body:
                if not (match := hlo.INSTRUCTION.match(text_line)):
                    continue
                line = Line(computation, match[1], match[2], match[3], match[4])
                self.lines[line.name] = line
                self._bodies[computation].append(line)
                if text_line.lstrip().startswith("ROOT "):
                    self._roots[computation] = line.name
                if line.operation == "parameter":
                    self._parameters[computation, _number(line)] = line.name
        for line in self.lines.values():
            for called in line.called if line.operation not in _REDUCERS else ():
                self._callers[called] = line
            for operand in line.operands if line.operation != "parameter" else ():
                self._users[operand].append(line.name)

    def maker(self, value: Value, inside: str = "") -> Value | None:
        """The value that was computed, behind tuples, loops and copies; of what a loop carries, the
        one that its body makes. None: it cannot be told. With `inside` it looks no further than
        that computation."""
        seen: set[Value] = set()
        while value not in seen and value[0] in self.lines:
            seen.add(value)
            following = self._before(value)
            if inside and following and self.lines[following[0]].computation != inside:
                return value
            if following is None:
                return value
            value = following
        return self._start(value) if value in seen else None

    def _before(self, value: Value) -> Value | None:
        """One step from a value to what it is, or None where it is computed here."""
        name, index = value
        line = self.lines[name]
        operation, operands = line.operation, line.operands
        if operation == "get-tuple-element":
            return operands[0], (_index(line), *index)
        if operation == "tuple" and index:
            return operands[index[0]], index[1:]
        if operation in _VIEWS:
            return operands[0], index if operation == "optimization-barrier" else ()
        if operation in ("while", "call", "conditional") and line.called:
            return self._roots[line.called[0]], index
        if operation == "parameter" and line.computation != self.entry:
            caller = self._callers.get(line.computation)
            if caller is None:
                return None
            if caller.operation == "while":
                return self._roots[line.computation], index
            return self._operand(caller, line), index
        return None

    def _start(self, value: Value) -> Value | None:
        """Where what goes round a loop unchanged came from."""
        name, index = value
        while self.lines[name].operation != "parameter":
            before = self._before((name, index))
            if before is None:
                return name, index
            name, index = before
        loop = self._callers[self.lines[name].computation]
        return self.maker((loop.operands[0], index))

    def _operand(self, caller: Line, parameter: Line) -> str:
        number = _number(parameter)
        if caller.operation == "conditional":
            number += 1 + caller.called.index(parameter.computation)
        return caller.operands[number]

    def written(self, value: Value) -> list[Line]:
        """The instruction of a value; of a fusion also those inside it, the one that makes the
        value first."""
        line = self.lines[value[0]]
        if line.operation != "fusion":
            return [line]
        inner = self.maker((self._roots[line.called[0]], value[1]), inside=line.called[0])
        first = [self.lines[inner[0]]] if inner else []
        return [line, *first, *reversed(self._bodies[line.called[0]])]

    def moved(self, value: Value) -> Value | None:
        """The value that this one holds moved, cut, cast or summed over devices; None of one that
        is computed."""
        name, index = value
        for _ in range(32):
            line = self.lines[name]
            if line.operation in ("fusion", "while", "call", "conditional"):
                if not line.called:
                    return None
                name = self._roots[line.called[0]]
            elif line.operation == "parameter":
                caller = self._callers.get(line.computation)
                if caller is None or caller.operation != "fusion":
                    return None
                operand = (self._operand(caller, line), index)
                return self.maker(operand)
            elif line.operation in ("tuple", "get-tuple-element"):
                before = self._before((name, index))
                if before is None:
                    return None
                name, index = before
            elif re.sub("-(start|done)$", "", line.operation) in _CARRIES and line.operands:
                place = index[-1] if line.operation.endswith("-start") and len(index) > 1 else 0
                operands = line.operands
                name, index = operands[place if place < len(operands) else 0], ()
                if self.lines[name].computation == self.lines[value[0]].computation:
                    return self.maker((name, index))
            else:
                return None
        return None

    def history(self, value: Value, steps: int = 8) -> Iterator[Value]:
        """The value, what it holds moved, what that holds, and so on."""
        for _ in range(steps):
            yield value
            following = self.moved(value)
            if following is None or following == value:
                return
            value = following

    def copied(self, value: Value, seen: set[Value] | None = None) -> set[str] | None:
        """Paths of the arguments of which a value is a copy, however moved, gathered and cast; None
        where anything was computed."""
        seen = set() if seen is None else seen
        if value in seen:
            return set()
        seen.add(value)
        name, index = value
        line = self.lines.get(name)
        if line is None:
            return None
        if line.operation == "parameter" and line.computation == self.entry:
            return {line.op_name}
        if line.operation == "constant":
            return set()
        sources: list[Value] = []
        if line.operation == "fusion":
            sources = [(self._roots[line.called[0]], index)]
        elif line.operation == "parameter" and line.computation in self._callers:
            caller = self._callers[line.computation]
            if caller.operation == "while":
                sources = [(self._roots[line.computation], index), (caller.operands[0], index)]
            else:
                sources = [(self._operand(caller, line), index)]
        elif line.operation in ("dynamic-slice", "pad"):
            sources = [(line.operands[0], ())]
        elif line.operation.endswith("-start") and line.operation in _MOVES:
            place = index[1:] if len(index) > 1 else (0,)  # of ((operands), results)
            sources = [(line.operands[place[0] if len(line.operands) > 1 else 0], ())]
        elif line.operation.endswith("-done") and line.operation in _MOVES:
            sources = [(line.operands[0], (1, *index))]
        elif line.operation == "all-gather" and index:
            sources = [(line.operands[index[0]], ())]
        elif line.operation in _MOVES:
            sources = [(operand, ()) for operand in line.operands]
        elif (before := self._before(value)) is not None:
            sources = [before]
        if not sources:
            return None
        files: set[str] = set()
        for source in sources:
            paths = self.copied(source, seen)
            if paths is None:
                return None
            files |= paths
        return files

    def stack(self, value: Value) -> str:
        """What a stack is for that a loop writes entry by entry, by how it is read: `sum`, entries
        are added to; `queue`, the loop that writes them also reads them; `kept`, another loop does;
        `result`, none does. "" of anything else."""
        writer, made = self.lines[value[0]], self._made(value)
        if made.operation in ("broadcast", "constant"):  # zeros, to be filled by a loop
            return next(filter(None, map(self.stack, self._filled(value, set()))), "")
        if made.operation != "dynamic-update-slice":
            return ""
        caller = self._callers.get(writer.computation)
        if caller is None or caller.operation != "while":
            return ""
        slots = [place for place in self._slots(caller) if self._writes(caller, place, value)]
        if not slots:
            return ""
        slot = slots[0]
        parameter = self._parameters[writer.computation, 0]
        readers = list(self._slices((parameter, slot), set()))
        put = list(self._behind(made.operands[1]))
        sums = (line for line in put if line.operation == "add")
        terms = {term.name for line in sums for n in line.operands for term in self._behind(n)}
        if any(reader.name in terms for reader in readers):
            return "sum"
        # Whoever writes only where an index is inside puts the old entry back where it is not.
        if any(reader not in put for reader in readers):
            return "queue"
        return "kept" if any(self._slices((caller.name, slot), set())) else "result"

    def _made(self, value: Value) -> Line:
        """The instruction that makes a value, in a fusion and behind casts."""
        line = self.written(value)[:2][-1]
        while line.operation in ("convert", "transpose", "reshape", *_VIEWS) and line.operands:
            before = self.lines[line.operands[0]]
            if before.computation != line.computation or before.operation == "parameter":
                break
            line = before
        return line

    def _filled(self, value: Value, seen: set[Value]) -> Iterator[Value]:
        """What loops make of a value that they begin with."""
        if value in seen:
            return
        seen.add(value)
        for user in self._users[value[0]]:
            line = self.lines[user]
            if line.operation == "tuple":
                for n in (n for n, operand in enumerate(line.operands) if operand == value[0]):
                    yield from self._filled((user, (n, *value[1])), seen)
            elif line.operation == "get-tuple-element":
                if value[1][:1] == (_index(line),):
                    yield from self._filled((user, value[1][1:]), seen)
            elif line.operation == "while":
                made = self.maker((user, value[1]))
                if made and made != value and self.lines[made[0]].computation == line.called[0]:
                    yield made
                else:  # it goes round unchanged
                    inside = self._parameters[line.called[0], 0]
                    yield from self._filled((inside, value[1]), seen)
            elif line.operation in _VIEWS:
                yield from self._filled((user, value[1]), seen)

    def _slots(self, loop: Line) -> Iterator[tuple[int, ...]]:
        root = self.lines[self._roots[loop.called[0]]]
        return ((n,) for n in range(len(root.operands)) if root.operation == "tuple")

    def _writes(self, loop: Line, slot: tuple[int, ...], value: Value) -> bool:
        """Whether the body of a loop puts a value into a slot of what it carries."""
        source: Value | None = (self._roots[loop.called[0]], slot)
        while source is not None and source != value:
            if self.lines[source[0]].operation in ("parameter", "while"):
                return False
            source = self._before(source)
        return source == value

    def _slices(self, value: Value, seen: set[Value]) -> Iterator[Line]:
        """Whatever reads an entry of a stack: forward through views, tuples, loops and fusions."""
        if value in seen:
            return
        seen.add(value)
        for user in self._users[value[0]]:
            line = self.lines[user]
            places = [n for n, operand in enumerate(line.operands) if operand == value[0]]
            if line.operation == "dynamic-slice" and 0 in places:
                yield line
            elif line.operation == "get-tuple-element":
                if value[1][:1] == (_index(line),):
                    yield from self._slices((user, value[1][1:]), seen)
            elif line.operation == "tuple":
                if user == self._roots[line.computation]:
                    continue  # what goes round again, or out of the loop: the caller looks there
                for n in places:
                    yield from self._slices((user, (n, *value[1])), seen)
            elif line.operation == "while":
                body = line.called[0]
                yield from self._slices((self._parameters[body, 0], value[1]), seen)
                yield from self._slices((user, value[1]), seen)
            elif line.operation in ("fusion", "call"):
                for n in places:
                    inside = (self._parameters[line.called[0], n], value[1])
                    yield from self._slices(inside, seen)
            elif line.operation in _VIEWS or line.operation in ("convert", "transpose"):
                yield from self._slices((user, value[1]), seen)
        outer = self._callers.get(self.lines[value[0]].computation)
        if outer and outer.operation == "fusion":
            for index in self._results(value, outer):
                yield from self._slices((outer.name, index), seen)

    def _results(self, value: Value, fusion: Line) -> list[tuple[int, ...]]:
        """The places in a fusion's result of a value inside it."""
        root = self.lines[self._roots[fusion.called[0]]]
        if root.name == value[0]:
            return [value[1]]
        if root.operation != "tuple":
            return []
        return [(n,) for n, operand in enumerate(root.operands) if operand == value[0]]

    def _behind(self, name: str, seen: set[str] | None = None) -> Iterator[Line]:
        """The instructions that an array is of, back through casts, choices and fusions."""
        seen = set() if seen is None else seen
        if name in seen:
            return
        seen.add(name)
        line = self.lines[name]
        yield line
        if line.operation == "fusion":
            yield from self._behind(self._roots[line.called[0]], seen)
        elif line.operation == "parameter":
            caller = self._callers.get(line.computation)
            if caller and caller.operation == "fusion":
                yield from self._behind(self._operand(caller, line), seen)
        elif line.operation == "select" or line.operation in _MOVES - {"dynamic-slice"}:
            for operand in line.operands:
                yield from self._behind(operand, seen)


_REDUCERS = ("reduce", "all-reduce", "reduce-scatter", "scatter", "sort", "reduce-window", "map")


def _number(parameter: Line) -> int:
    return int(parameter.rest.partition(")")[0])


def _index(line: Line) -> int:
    match = re.search(r"index=(\d+)", line.rest)
    assert match, f"a get-tuple-element without index: {line.rest[:100]}"
    return int(match[1])
