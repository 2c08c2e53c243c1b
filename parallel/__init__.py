"""How one model lies over many ranks. The layout never changes the mathematics."""
