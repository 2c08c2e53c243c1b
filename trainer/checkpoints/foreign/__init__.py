"""State dictionaries of other programs: theirs to ours, and ours to theirs.

`convert` and `to_foreign` are the whole of it; a file a program says what its tensors are called and
how they lie (`dit.py`, `tarflow.py`, `flux.py`, `jet.py`), as moves that `moves.py` reads in either
direction. `diffusers_layout.py` goes on from the published names to those of diffusers.
"""

from trainer.checkpoints.foreign.conversion import (
    SOURCES,
    Converted,
    convert,
    source_named,
    to_foreign,
)

__all__ = ["SOURCES", "Converted", "convert", "source_named", "to_foreign"]
