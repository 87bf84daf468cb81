"""Seconds a step takes, by arithmetic: matmuls, attention, memory traffic, collectives over their links, bubble."""

from jaxpar.hardware import Hardware

LATENCY = 10e-6
"""Seconds that a collective takes however small it is."""

_ROUNDS = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


def collective_seconds(kind: str, size: float, devices: int, near: int, hardware: Hardware) -> float:
    """Time of one collective at the speed of the links it crosses.

    A ring of n devices sends (n-1)/n of the whole, an all-reduce twice that, a permute all of it. Over the fast links
    it runs at their speed; where it leaves them, at the speed of the network cards of all members that sit together.

    Args:
      kind: as in HLO.
      size: bytes of the whole: the result of a gather, the input of a scatter.
      devices: n, members of a group.
      near: members of a group that the fast links join.
      hardware: whose links.
    """
    bandwidth = hardware.link if near >= devices else min(hardware.link, hardware.network * near)
    share = 1.0 if kind == "collective-permute" else _ROUNDS[kind] * (devices - 1) / devices
    return LATENCY + share * size / bandwidth if devices > 1 else 0.0
