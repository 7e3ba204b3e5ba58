"""The benchmark: verify first, then time side by side in one run, on the user's own machine.

One module for each part of a result (``accuracy``, ``scans`` with ``signatures``, ``forward``, ``stream``,
``families``), each with a function ``measure`` that yields entries and a function ``describe`` that puts one
into words. ``command`` runs them and saves after every entry; ``figure`` draws a result file. Nothing here
decides whether a figure is good.
"""
