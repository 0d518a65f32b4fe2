"""How fast a step is on this machine, beside its peers and beside the hardware's limit.

``make bench`` (``python -m benchmarks.steps``) runs the cases of
`benchmarks.steps.cases`, each in a process of its own, and writes their numbers as JSON
and as a table.
"""
