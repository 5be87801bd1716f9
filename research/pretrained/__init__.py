"""From published dense weights to ternary N:M models: which way loses least, at equal tokens.

:mod:`research.pretrained.trials` says what is compared, :mod:`research.pretrained.train` trains one of them, and
``python -m research.pretrained`` does all of them. The command needs one GPU, a model in any format that ``import-hf``
reads, and folders that ``prepare`` wrote with the tokenizer of the model.
"""
