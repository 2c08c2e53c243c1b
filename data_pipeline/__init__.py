"""From tar shards to batches: a global order that no number of ranks can change."""
