"""Model families, one file each. :mod:`~sbn_lightning.models.families.registry` lists them and finds them.

A family has no code of its own that computes: its mechanisms are options of
:class:`~sbn_lightning.models.config.TransformerConfig`, and stand once in :mod:`sbn_lightning.models`.
"""
