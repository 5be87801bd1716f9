"""Small models and checkpoints of the export tests."""

import torch

from sbn_lightning import TernaryTransformer
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.tokenizers import beside
from sbn_lightning.data.tokenizer import byte_tokenizer
from tests.helpers import small_config


def make_model(seed=0, **changes):
    """A model whose parameters are all away from what they start as, gammas and biases of q, k, v included."""
    torch.manual_seed(seed)
    model = TernaryTransformer(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if name.endswith(("qkv.weight", "gate_up.weight")):
                parameter[parameter.shape[0] // 2 :] *= 3
    return model.eval()


def save(model, path, tokenizer=True):
    """Save a model as ``fit`` would, with the byte tokenizer beside the checkpoint."""
    torch.save(lightning_file.contents(model.config, model.state_dict()), path)
    if tokenizer:
        byte_tokenizer().save(str(beside(path)))
    return path


def some_tokens(vocab_size=320, batch=2, length=24, seed=1):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens):
    out = model(tokens)
    return getattr(out, "logits", out)
