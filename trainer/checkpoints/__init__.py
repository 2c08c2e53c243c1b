"""Checkpoints that belong to the run, not to the layout, and are either whole or absent.

`store.py` saves, loads, lists and verifies; `commit.py` makes a written folder a checkpoint in
one rename; `manifest.py` is the record of what a checkpoint holds; `shards.py` moves tensors to
and from its files.
"""
