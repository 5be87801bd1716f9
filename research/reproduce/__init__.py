"""Test the paper's claims again, at a scale where one GPU trains a model in minutes.

* ``corpus`` turns every Python file of this machine into tokens, each text once.
* ``grid`` reads a YAML file of factors and groups, and makes runs with stable ids.
* ``runner`` starts each run as a process, several at a time, and collects one line of JSON from each (``results``).
* ``worker`` is such a process: ``fit``, then the held-out loss and the ``probe``.
* ``report``, ``tables`` and ``plots`` make Markdown and pictures from the lines, next to what the ``paper`` reports.
* ``best`` compares the ways to train, each at its own best learning rate.
* ``not_run`` lists the runs of a grid that have no line.
* ``noise`` computes how large a difference must be to count.

A run is an ordinary ``fit`` with a recipe, which is written next to the results of the run.
"""
