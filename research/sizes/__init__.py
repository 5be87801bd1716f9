"""Does 2:4 hold at larger sizes? Trainings of 2M to 60M parameters, side by side on one GPU, and a fit of the gap.

``python -m research.sizes`` lists the commands. :mod:`research.sizes.trials` says what is trained and in which order,
:mod:`research.sizes.train` trains one model, and :mod:`research.sizes.fit` compares the losses.
"""
