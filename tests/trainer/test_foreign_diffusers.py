"""What is exported in diffusers' layout, diffusers loads and computes the same with."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from safetensors.torch import save_file

from flows.errors import UserError
from flows.models.dit import DiT
from flows.models.jet import JetConfig
from flows.models.mmdit import MMDiT
from trainer.checkpoints.foreign import convert
from trainer.checkpoints.foreign.diffusers_layout import WEIGHTS, export

from .references import flux as flux_reference
from .test_foreign_dit import inputs, repa, sit
from .test_foreign_flux import FACTS, flux
from .test_foreign_flux import inputs as flux_inputs


def loaded(kind, folder: Path, config, state):
    """Written and read back by diffusers' own `from_pretrained`."""
    content, settings = export(config, state)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(content, folder / WEIGHTS)
    model, report = kind.from_pretrained(
        folder, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("source", ["sit", "repa", "dit"])
def test_diffusers_computes_what_the_model_computes(source: str, tmp_path: Path) -> None:
    heads = {"heads": 2, "align_depth": 1} if source == "repa" else {"heads": 4}
    config, state = convert(repa() if source == "repa" else sit(), source=source, **heads)
    ours = DiT(config).eval()
    ours.load_state_dict(state)
    theirs = loaded(DiTTransformer2DModel, tmp_path, config, state)
    x, t, label = inputs(config)
    told, sign = t, 1
    if source == "repa":
        told, sign = 1 - t, -1
    if source == "dit":
        told = 1000 * (1 - t) - 1
        # Integer steps cannot be refitted; with the frequencies of the paper it is the same network.
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    with torch.no_grad():
        found = theirs(x, told, label).sample[:, : config.channels]
        expected = sign * ours(x, t, label)
    tolerance = 1e-4 if source == "dit" else 2e-5  # 6e-5 of rounding in steps near 1,000
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_without_the_refit_times_would_be_mistaken(tmp_path: Path) -> None:
    """The law above can fail: the weights as they are give another network."""
    config, state = convert(sit(), source="sit", heads=4)
    content, _ = export(config, state)
    first = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"
    assert (content[first] - state["time.up.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [False, True])
def test_diffusers_computes_what_flux_computes(guidance: bool, tmp_path: Path) -> None:
    config, state = convert(flux(guidance=guidance), source="flux", **FACTS)
    ours = MMDiT(config).eval()
    ours.load_state_dict(state)
    theirs = loaded(FluxTransformer2DModel, tmp_path, config, state)
    x, t, text, vector = flux_inputs()
    strength = torch.tensor([3.5, 1.0, 5.0]) if guidance else None
    place = torch.arange(4.0)
    rows, columns = place.repeat_interleave(4), place.repeat(4)
    ids = torch.stack((torch.zeros(16), rows, columns), 1)
    with torch.no_grad():
        packed = theirs(
            flux_reference.pack(x),
            encoder_hidden_states=text,
            pooled_projections=vector,
            timestep=1 - t,
            img_ids=ids,
            txt_ids=torch.zeros(5, 3),
            guidance=strength,
        ).sample
        expected = ours(x, t, text=text, vector=vector, guidance=strength)
    # Norms of queries and keys have an epsilon of 1e-6 there and of 1e-5 here, on squares of about 0.1.
    found = -flux_reference.unpack(packed, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_models_that_diffusers_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match="diffusers has no model of the family jet;"):
        export(JetConfig(8, 3, 5, 2, 32, 2, 1, 2), {})
    config, state = convert(sit(), source="sit", heads=4)
    changed = type(config)(**{**vars(config), "rope": True})
    with pytest.raises(UserError, match=r"model\.rope = True has no place in a diffusers file"):
        export(changed, state)
