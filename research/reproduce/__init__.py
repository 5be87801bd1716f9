"""The paper's claims, re-run at a scale that one GPU does in minutes.

* ``corpus``: every Python file of this machine, once, as tokens;
* ``grid``: a YAML file of factors and groups -> runs with stable ids;
* ``runner``: runs them as processes of their own, several at a time, and collects one line of JSON each (``results``);
* ``worker``: one such process: ``fit``, then the held-out loss and the ``probe``;
* ``report``, ``tables``, ``plots``: Markdown and pictures from those lines, next to what the ``paper`` reports;
* ``best``: every way to train at its own best learning rate;
* ``not_run``: what of a grid has no line;
* ``noise``: what a difference has to exceed to count.

Nothing here trains in a way of its own: a run is ``fit`` with a recipe that is written next to its results.
"""
