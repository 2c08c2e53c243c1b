"""Which rank has which experts: fewer tokens that change ranks between layers, ranks with equal loads.

Plain functions over numpy arrays; of processes and devices nothing is known here.
"""
