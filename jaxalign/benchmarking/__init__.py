"""How fast a step is on this machine, beside its peers and beside the hardware's limit.

``jaxalign bench`` (``make bench``) runs the cases of `jaxalign.benchmarking.cases`,
each in a process of its own, and writes their numbers as JSON and as a table.
"""
