"""AdamW's update in the step compiled for absent GPUs: one kernel a weight, in place, at the bytes
it must move."""

import math
import re

import pytest
from test_lowering import compile_step, make_config

from jaxpar.config import MeshConfig

F32 = 4


def entry(text: str) -> dict[str, tuple[str, str, list[str]]]:
    """Result type, opcode and operands of the instructions of the entry computation, by name;
    arguments of the step by theirs, such as `state.model.embedding.value`."""
    lines = re.split(r"^ENTRY ", text, flags=re.MULTILINE)[1].splitlines()[1:]
    made = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*[a-z])\((.*?)\)(?:,|$)")
    argument = re.compile(r'%([\w.\-]+) = .* parameter\(.*op_name="(state[^"]*)"')
    names = {match[1]: match[2] for line in lines if (match := argument.search(line))}
    found = {}
    for line in lines:
        if match := made.match(re.sub(r"/\*.*?\*/", "", line)):
            name, result, opcode, operands = match.groups()
            operands = [
                names.get(operand, operand) for operand in re.findall(r"%([\w.\-]+)", operands)
            ]
            found[names.get(name, name)] = result, opcode, operands
    return found


def elements(result: str) -> list[int]:
    """Numbers of elements of the float32 arrays of a result."""
    return [
        math.prod(int(n) for n in dims.split(",") if n)
        for dims in re.findall(r"f32\[([\d,]*)\]", result)
    ]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (MeshConfig(), {}),
        (MeshConfig(fsdp=8), {}),
        (MeshConfig(data=2, fsdp=2, tensor=2), dict(optimizer_sharding="data")),
    ],
    ids=["one device", "fsdp", "ZeRO-1"],
)
def test_each_weight_is_updated_by_one_kernel(sizes, options):
    config = make_config(sizes, **options)
    compiled, _ = compile_step(config, sizes, "gpu")
    found = entry(compiled.as_text())
    moments = [name for name in found if re.match(r"state\.optimizer\[0\]\.(mu|nu)\.", name)]
    weights = [name for name in found if name.startswith("state.model.")]
    assert len(moments) == 2 * len(weights) > 10

    kernels = {}
    for moment in moments:
        users = [name for name, (_, _, operands) in found.items() if moment in operands]
        assert len(users) == 1 and found[users[0]][1] == "fusion", (moment, users)
        kernels.setdefault(users[0], []).append(moment)
    assert len(kernels) == len(weights)

    moved = 0
    for kernel, (mu, nu) in kernels.items():
        result, _, operands = found[kernel]
        (size,) = elements(found[mu][0])
        assert elements(found[nu][0]) == [size]
        assert (
            elements(result) == [size] * 3
        )  # weight and moments, all read before they are written
        read = sum(sum(elements(found[operand][0])) for operand in operands)
        moved += F32 * (read + 3 * size)
    floor = 28 * sum(sum(elements(found[weight][0])) for weight in weights)
    assert floor <= moved <= 1.01 * floor  # what is over are scalars
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes >= stats.output_size_in_bytes - 2**16  # all but the metrics
