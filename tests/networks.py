"""Tiny networks with random weights, saved as the real ones are."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<pad>", "</s>", "<unk>", "<s>", *"abcdefghijklmnopqrstuvwxyz"]


def save_autoencoder(folder: Path, *, seed: int = 0, image_channels: int = 3) -> Path:
    """Two levels: a latent stands for 2x2 pixels and has 4 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
            shift_factor=0.1,
            scaling_factor=1.5,
        ).save_pretrained(folder)
    return folder


def save_t5(folder: Path, *, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        T5EncoderModel(T5Config(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    _save_tokenizer(folder, "$A </s>")
    return folder


def save_clip(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=3,
            eos_token_id=1,
            pad_token_id=0,
        )
        CLIPTextModel(config).save_pretrained(folder)
    _save_tokenizer(folder, "<s> $A </s>")
    return folder


def _save_tokenizer(folder: Path, template: str) -> None:
    """A token for each letter."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", 1), ("<s>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
