"""Examples -> packs: rows of several examples that fill a length. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs by best fit decreasing: longest first, each into the fullest pack that still has room (Johnson 1973).

    Packs by the room they have left are found through the bits of one number, so an item costs about a microsecond
    whatever their number.

    Args:
        lengths: of the examples, in tokens, each from 1 to `capacity`.
        capacity: most tokens of a pack.

    Returns:
        Indices into `lengths` by pack; a function of the arguments alone.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some pack has room r
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        assert 0 < length <= capacity, f"an example of {length} tokens does not fit a pack of {capacity}"
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            waiting = by_room[room]
            pack = waiting.pop()
            if not waiting:
                rooms ^= 1 << room
            packs[pack].append(index)
        else:
            room, pack = capacity, len(packs)
            packs.append([index])
        room -= length
        if room:
            by_room.setdefault(room, []).append(pack)
            rooms |= 1 << room
    return packs


def efficiency(lengths: Sequence[int], packs: int, capacity: int) -> float:
    """Share of the packs' room that holds tokens."""
    return sum(lengths) / max(packs * capacity, 1)
