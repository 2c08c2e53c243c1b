"""What is trained: models, objectives and samplers as plain single-device PyTorch.

Nothing here knows of ranks, meshes or files. Time runs from noise (t = 0) to data (t = 1) everywhere.
"""
