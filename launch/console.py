"""Where commands print for people: what users name may hold brackets and colons, and stays as it is."""

from rich.console import Console


def plain(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """A console that reads no markup and no emoji codes, in lines, tables and their titles alike."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False)
