"""Texts of one's own, embedded as the captions were that a model was trained on."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data_pipeline.description import Texts, folder_of, read_description
from data_pipeline.encoders.texts import open_text_encoder
from data_pipeline.shards import expand
from data_pipeline.texts import TextMember, Words
from flows.errors import UserError
from trainer.data_sections import TextSection
from trainer.recipe import Recipe
from trainer.refusals import shown
from trainer.storage import reach_storage


def embed_prompts(recipe: Recipe, prompts: Sequence[str]) -> Tensor:
    """(prompts, tokens, width) float32, on the CPU: what shards hold of captions that read like these.

    Raises UserError if the recipe names no encoder of texts, or another than its shards were encoded
    by, and for a text that is too long or empty.
    """
    section = recipe.data.text
    assert section is not None
    if section.encoder is None:
        raise UserError(
            "sample.prompts are to be embedded, and data.text.encoder does not say by what; set it to what "
            "`flowmill data encode --text` was given for these shards."
        )
    reach_storage(recipe)
    made = _texts_of(recipe.data.heldout or recipe.data.sources[0][0])
    words = _embed(section.encoder, section.tokens, made, tuple(prompts))
    return text_member(section).stack(words)


def text_member(section: TextSection) -> TextMember:
    """Where samples hold their captions."""
    return TextMember(section.member, section.tokens, section.width)


def _texts_of(pattern: str) -> Texts:
    """What the captions in some shards are; raises UserError if nothing says that, or two things."""
    found = {}
    for folder in sorted({folder_of(url) for url in expand(pattern)}):
        description = read_description(folder)
        if description is None or description.texts is None:
            raise UserError(
                f"{folder}: has no dataset.json that says by what captions were embedded, so that no text "
                "can be embedded alike; encode the shards by `flowmill data encode`."
            )
        found[folder] = description.texts
    (first, made), *others = found.items()
    for folder, texts in others:
        if texts != made:
            raise UserError(f"{folder}: its captions were not embedded as those in {first}.")
    return made


@lru_cache(4)
def _embed(encoder: str, tokens: int, made: Texts, prompts: tuple[str, ...]) -> list[Words]:
    network = open_text_encoder(
        encoder, max_tokens=made.max_tokens, precision="fp32", device=torch.device("cpu")
    )
    if network.fingerprint != made.encoder:
        raise UserError(
            f"data.text.encoder = {encoder} is not the {made.kind} encoder of width {made.width} that made "
            "the captions of the shards; give that one."
        )
    embedded = []
    for prompt in prompts:
        found = network.encode([prompt])
        (words,) = found.tokens
        if found.cut or len(words) > tokens:
            raise UserError(
                f"The prompt {shown(prompt)} is longer than the {min(tokens, made.max_tokens)} words (or "
                "pieces of words) that the model was trained to read; shorten it."
            )
        if not len(words):
            raise UserError(f"The prompt {shown(prompt)} has no word in it; give one that does.")
        # Rounded as the shards' captions were.
        embedded.append(words.numpy().astype(made.dtype).astype(np.float32))
    return embedded
