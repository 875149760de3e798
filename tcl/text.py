"""What TCL asks of CLIP's text tower that open_clip does not offer: batches shorter than the context.

Shapes: M texts, L tokens, C width, D embedding.
"""

import torch
from open_clip.model import CLIP
from torch import Tensor

from .vision import run_blocks


def embed_texts(clip: CLIP, token_ids_ML: Tensor) -> Tensor:
    """Embed texts, (M, L) int64 -> (M, D), not normalised; L may be shorter than the context.

    The tower is causal and its output is read at the first end-of-text token (the largest id), so what stands after that
    token, and how much of it, cannot change the result.
    """
    length = token_ids_ML.shape[1]
    x_MLC = clip.token_embedding(token_ids_ML) + clip.positional_embedding[:length]
    causal_LL = clip.attn_mask[:length, :length]
    x_MLC = run_blocks(clip.transformer, clip.transformer.resblocks, x_MLC, attn_mask=causal_LL)
    end_M = token_ids_ML.argmax(dim=-1)  # the first of them
    x_MC = x_MLC[torch.arange(len(x_MLC), device=x_MLC.device), end_M]
    embedding_MD: Tensor = clip.ln_final(x_MC) @ clip.text_projection
    return embedding_MD
