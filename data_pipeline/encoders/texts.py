"""Captions to embeddings, by a T5 or CLIP text encoder of `transformers` from a local folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipeline.encoders.autoencoder import DTYPES
from data_pipeline.encoders.embedded import Embedded
from data_pipeline.encoders.hashed import HashedWords, parse_hashed
from data_pipeline.encoders.weights import DAMAGE, check_complete, fingerprint, read_config
from data_pipeline.storing import reason
from flows.errors import UserError

WHAT = "a T5 or CLIP text encoder with its tokenizer (config.json, *.safetensors, tokenizer files)"
HASHED = "hashed:"
KINDS: dict[str, Literal["t5", "clip"]] = {"t5": "t5", "clip": "clip", "clip_text_model": "clip"}


class TextEncoder:
    """A frozen text encoder on one device.

    kind: t5 or clip; width: of its embeddings; pooled: width of the one vector a caption, if any
    max_tokens: longer captions are cut

    Raises UserError if the folder holds no whole encoder in safetensors with its tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_tokens: int,
        precision: Literal["fp32", "bf16"],
        device: torch.device,
    ) -> None:
        config = read_config(folder, WHAT)
        kind = KINDS.get(str(config.get("model_type")))
        if kind is None:
            raise UserError(
                f"{folder}: holds {config.get('model_type')}; give the folder of {WHAT}"
            )
        self.kind: Literal["t5", "clip"] = kind
        self.device = device
        self.fingerprint = fingerprint(folder)
        self._model, self._tokenizer = _load(folder, kind)
        self._model.to(device=device, dtype=DTYPES[precision])
        hidden = self._model.config
        self.width = int(hidden.d_model if kind == "t5" else hidden.hidden_size)
        self.pooled = self.width if kind == "clip" else None
        longest = getattr(hidden, "max_position_embeddings", max_tokens)
        if max_tokens > longest:
            raise UserError(
                f"{folder}: reads at most {longest} tokens, not {max_tokens}; ask for fewer"
            )
        self.max_tokens = max_tokens

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Embedded:
        """Embeddings of a few captions; one caption's do not depend on the others' length."""
        whole = self._tokenizer(list(captions), padding=False, truncation=False)["input_ids"]
        batch = self._tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        mask = batch["attention_mask"]
        found = self._model(input_ids=batch["input_ids"], attention_mask=mask)
        states = found.last_hidden_state.float().cpu()
        tokens = [row[keep] for row, keep in zip(states, mask.bool().cpu(), strict=True)]
        pooled = None if self.pooled is None else found.pooler_output.float().cpu()
        return Embedded(tokens, pooled, sum(len(ids) > self.max_tokens for ids in whole))


def open_text_encoder(
    name: str,
    *,
    max_tokens: int,
    precision: Literal["fp32", "bf16"],
    device: torch.device,
) -> "TextEncoder | HashedWords":
    """An encoder of captions by name: `hashed:WIDTH`, or the local folder of a network.

    Raises UserError for a width that is none and for a folder without a whole encoder.
    """
    if name.startswith(HASHED):
        return parse_hashed(name, max_tokens=max_tokens)
    return TextEncoder(Path(name), max_tokens=max_tokens, precision=precision, device=device)


def _load(folder: Path, kind: str) -> tuple[Any, Any]:
    """Model and tokenizer; raises UserError naming the folder."""
    try:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError(
            f"encoding text needs the transformers package ({reason(error)}); "
            "pip install 'flowmill[encode]'"
        ) from error
    # A bar a network says nothing that a log should keep.
    disable_progress_bar()
    network = T5EncoderModel if kind == "t5" else CLIPTextModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        model, report = network.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except DAMAGE as error:
        raise UserError(
            f"{folder}: the text encoder cannot be loaded ({reason(error)}); copy it "
            "with its tokenizer again"
        ) from error
    check_complete(folder, report["missing_keys"])
    return model.eval().requires_grad_(False), tokenizer
