"""Forward passes of published programs, written from their papers and the formats of their files.

Plain functions of a state dictionary under the published names; nothing of ours is imported. The
tests hold converted models against them.
"""
