"""Hugging Face folders of the families in :mod:`sbn_lightning.models.families`, in and out."""
