"""Mutations that know a format: bytes alone seldom turn a number into a list, or put a checksum right."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]
"""Other bytes of about the same make; where `data` is not of the format, `data` as it is."""

_VALUES = (
    10**400,
    -(10**400),
    2**63,
    -1,
    0,
    1,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
    "",
    [],
    {},
)
_TEXTS = ("\ud800", "\udc80", "\0", "\n", "../x", "/etc/passwd", "masks/" + "a" * 300, "\u202e", "<b>", "a" * 5000)


def json_value(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON text is replaced, left out or put somewhere else."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(_TEXTS)] = holder.pop(key)
    elif kind == 2:
        other, at = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[at]))
    elif kind == 3:
        holder[key] = rng.choice(_TEXTS)
    else:
        holder[key] = rng.choice(_VALUES)
    return json.dumps(root[0]).encode() if root else b""


def json_of_records(data: bytes, rng: random.Random) -> bytes:
    """A value of run.json or of a line of the manifest behind it."""
    run, zero, lines = data.partition(b"\0")
    parts = [run, *lines.splitlines()]
    at = rng.randrange(len(parts))
    parts[at] = json_value(parts[at], rng)
    return parts[0] + zero + b"".join(line + b"\n" for line in parts[1:])


def tiff_tag(data: bytes, rng: random.Random) -> bytes:
    """An entry of the first directory of a little-endian classic TIFF has another type, count or value."""
    if data[:4] != b"II*\0" or len(data) < 8:
        return data
    (start,) = struct.unpack_from("<I", data, 4)
    if start + 2 > len(data):
        return data
    (count,) = struct.unpack_from("<H", data, start)
    place = start + 2 + 12 * rng.randrange(max(1, count))
    if place + 12 > len(data):
        return data
    changed = bytearray(data)
    number = rng.choice((0, 1, 2, 3, 4, 8, 16, 255, 256, 2**15, 2**16, 2**24, 2**31, 2**32 - 1, rng.randrange(2**32)))
    kind = rng.randrange(3)
    if kind == 0:
        struct.pack_into("<H", changed, place + 2, rng.randrange(19))
    else:
        struct.pack_into("<I", changed, place + 4 * kind, number)
    return bytes(changed)


def png_sums(data: bytes, rng: random.Random) -> bytes:
    """Any byte is another, and every chunk has the right checksum."""
    changed = bytearray(data)
    if changed:
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    data, parts, position = bytes(changed), [bytes(changed[:8])], 8
    while (end := position + 8 + int.from_bytes(data[position : position + 4], "big")) + 4 <= len(data):
        parts += [data[position:end], struct.pack(">I", zlib.crc32(data[position + 4 : end]))]
        position = end + 4
    return b"".join([*parts, data[position:]])
