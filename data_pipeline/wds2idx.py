"""Indexes that DALI's `wds2idx` has left beside a shard (`x.idx` for `x.tar`): a shard with one is not
read to be indexed.

Such a file does not say which shard it was made for, so it is believed only if it is not older, fits
into the shard, and the headers of a few members are where it says.
"""

import tarfile
from collections.abc import Sequence
from itertools import pairwise

from data_pipeline.headers import BLOCK, Member, refuse_name
from data_pipeline.storage import Facts, facts, fetch, read_whole

VERSION = "v1.2"
# Members whose headers are looked at, evenly spread, the last among them.
LOOKED_AT = 4
FIELDS = 4


def import_idx(url: str, shard: Facts) -> list[Member] | None:
    """The members of the shard at `url` by its `.idx` file; None if there is none to believe.

    Raises UserError for a member that leads outside.
    """
    if not url.endswith(".tar"):
        return None
    beside = url.removesuffix(".tar") + ".idx"
    try:
        if _is_older(facts(beside), shard):
            return None
        members = _parse(read_whole(beside).decode())
        if members is None or not _fits(members, shard.size) or not _are_there(members, url):
            return None
    except (OSError, UnicodeDecodeError):
        return None
    for member in members:
        refuse_name(member.name, url)
    return members


def _is_older(index: Facts, shard: Facts) -> bool:
    """By time of change, where both storages' marks are times."""
    try:
        return float(index.mark) < float(shard.mark)
    except ValueError:
        return False


def _parse(text: str) -> list[Member] | None:
    """Lines of `extension offset size name`, repeated; None for other versions and spaced names."""
    head, *lines = text.splitlines() or [""]
    if head.split() != [VERSION, str(len(lines))]:
        return None
    members = []
    for line in lines:
        words = line.split(" ")
        if len(words) % FIELDS:
            return None
        for start in range(0, len(words), FIELDS):
            _, offset, size, name = words[start : start + FIELDS]
            if not (offset.isdecimal() and size.isdecimal()):
                return None
            members.append(Member(name, int(offset), int(size)))
    return sorted(members, key=lambda member: member.offset)


def _fits(members: Sequence[Member], size: int) -> bool:
    """Each member begins at a block, after its header, and ends before the next or the end mark."""
    if not members or any(one.offset < BLOCK or one.offset % BLOCK for one in members):
        return False
    apart = all(_end(one) + BLOCK <= two.offset for one, two in pairwise(members))
    return apart and _end(members[-1]) + BLOCK <= size


def _end(member: Member) -> int:
    return member.offset + -(-member.size // BLOCK) * BLOCK


def _are_there(members: Sequence[Member], url: str) -> bool:
    last = len(members) - 1
    for number in sorted({last * turn // LOOKED_AT for turn in range(1, LOOKED_AT + 1)}):
        member = members[number]
        block = fetch(url, member.offset - BLOCK, member.offset)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        if (header.name, header.size) != (member.name, member.size) or not header.isreg():
            return False
    return True
