"""Measures the other rooms, and peers beside them. Nothing imports this room."""
