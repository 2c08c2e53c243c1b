"""A prompt is embedded as a caption of the shards would be; what cannot be embedded so is refused."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.encode import encode, open_job
from data_pipeline.encoders.job import Settings
from data_pipeline.shards import locate_embedded
from flows.errors import UserError
from launch.cli import main
from tests import networks
from trainer.asked import ask, asked_names
from trainer.assembly import plan
from trainer.prompts import embed_prompts
from trainer.recipe import Recipe, load_recipe
from trainer.sampling import with_overrides

HELDOUT = "embedded:emoji32-latents/heldout-000000.tar"
CPU = torch.device("cpu")
IDS = torch.arange(6)


def captions(count: int) -> list[str]:
    """Of the first held-out emoji."""
    with tarfile.open(locate_embedded(HELDOUT)) as archive:
        texts = (m for m in archive if m.name.endswith(".txt"))
        return [archive.extractfile(next(texts)).read().decode().strip() for _ in range(count)]


def emoji(*overrides: str) -> Recipe:
    return load_recipe("mmdit_emoji", list(overrides))


def prompted(prompts: list[str], *overrides: str) -> Recipe:
    return emoji(f"sample.prompts={json.dumps(prompts, ensure_ascii=False)}", *overrides)


def test_a_prompt_that_is_a_caption_asks_for_what_the_caption_asks_for() -> None:
    real, own = ask(emoji(), IDS), ask(prompted(captions(6)), IDS)
    assert torch.equal(real.text, own.text)
    assert real.text.abs().sum(dim=(1, 2)).min() > 0
    # It is of no class that a network could be told.
    assert own.condition(CPU)["label"].tolist() == [9] * 6
    assert real.condition(CPU)["label"].tolist() == real.labels.tolist()


def test_prompts_are_taken_in_turn_by_id_alone() -> None:
    recipe = prompted(["red heart", "grinning cat 🐱"])
    asked = ask(recipe, torch.tensor([3, 0, 5]))
    assert asked.labels.tolist() == [1, 0, 1]
    assert asked_names(recipe)[1] == "grinning cat 🐱"
    assert torch.equal(asked.text[0], asked.text[2])
    assert torch.equal(asked.take(torch.tensor([2])).condition(CPU)["text"][0], asked.text[0])
    assert not torch.equal(asked.text[0], asked.text[1])


def test_the_network_of_a_folder_embeds_prompts_as_it_did_captions(tmp_path: Path) -> None:
    networks.save_t5(tmp_path / "t5")
    settings = Settings(
        image_size=None, decoder="auto", dtype="float16", precision="fp32", posterior="mean",
        max_tokens=64,
    )  # fmt: skip
    job = open_job(
        [HELDOUT], str(tmp_path / "texts"), settings, autoencoder=None, text=str(tmp_path / "t5"),
        threads=1, batch=170, skip_bad=False, device=CPU,
    )  # fmt: skip
    encode(job, rank=0, ranks=1, report=lambda name, outcome: None)
    keys = (
        f"data.heldout={tmp_path}/texts/*.tar",
        f"data.text={{member: text.npy, tokens: 64, width: 8, encoder: {tmp_path}/t5}}",
    )
    said = captions(6)
    real, own = ask(emoji(*keys), IDS), embed_prompts(emoji(*keys), said)
    # A batch of captions and one alone may round otherwise before they are rounded to float16.
    torch.testing.assert_close(own, real.text, rtol=2e-3, atol=2e-3)
    assert own.abs().sum() > 0
    networks.save_t5(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"other is not the t5 encoder of width 8 that made"):
        embed_prompts(emoji(*keys, f"data.text.encoder={tmp_path}/other"), said)


@pytest.mark.parametrize(
    ("prompts", "overrides", "says"),
    [
        (["one two three four five six seven eight nine"], (), r"longer than the 8 words"),
        (["!"], (), r"'!' has no word in it"),
        (["cat"], ("data.text.encoder=null",), r"set it to what `flowmill data encode --text`"),
        (["cat"], ("data.text.encoder=hashed:32",), r"hashed:32 is not the hashed encoder of width 64"),
        (["cat"], ("data.text.encoder=nowhere",), r"nowhere: is no folder with a config.json"),
        (["cat"], ("data.heldout=embedded:emoji64/heldout-*.tar",), r"no dataset.json that says by what"),
    ],
)  # fmt: skip
def test_what_cannot_be_embedded(prompts: list[str], overrides: tuple[str, ...], says: str) -> None:
    recipe = prompted(prompts, *overrides)
    with pytest.raises(UserError, match=says):
        embed_prompts(recipe, prompts)
    with pytest.raises(UserError, match=says):
        plan(recipe, 1)  # before a training begins that draws grids of them


def test_models_that_read_no_text_and_prompts_that_are_none() -> None:
    for name in ("starflow_emoji", "digits8", "tokens_digits8"):
        with pytest.raises(UserError, match=r"has no data\.text: its model reads none"):
            load_recipe(name, ["sample.prompts=[red heart]"])
    with pytest.raises(UserError, match=r"value 1 of sample\.prompts = '' must not be empty"):
        prompted([""])
    assert with_overrides(emoji(), ["data.text.encoder=hashed:8"]).data.text.encoder == "hashed:8"


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["flowmill", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0

    small = (
        "model.width=32", "model.double_depth=1", "model.heads=1", "train.steps=1", "train.batch=4",
        "sample.every=1", "sample.count=2", "sample.steps=1", "sample.prompts=[red heart]",
        "tracking.mlflow=false", "data.lanes=4",
    )  # fmt: skip
    assert call("train", "mmdit_emoji", "run.dir=run", *small) == 0
    assert Path("run/samples/step-00000001.png").is_file()
    asked = ("--prompt", "cat", "--prompt", "dog")
    assert call("sample", "run", *asked) == 0
    two_rows = Image.open("run/samples/final.png").height
    assert call("sample", "run") == 0  # of the recipe's own prompt
    assert Image.open("run/samples/final.png").height < two_rows
    assert call("sample", "run", *asked, "--count", "3", "--form", "shards", "--out", "made") == 0
    with tarfile.open("made/samples-000000.tar") as archive:
        about = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]
    assert [one["prompt"] for one in about] == ["cat", "dog", "cat"]
    assert json.loads(Path("made/dataset.json").read_text())["class_names"] == ["cat", "dog"]
    # A folder of these is not one of others.
    assert call("sample", "run", "--prompt", "cat", "--form", "shards", "--out", "made") == 2
    assert call("sample", "run", "--prompt", "cat", "sample.prompts=[dog]") == 2
    assert call("evaluate", "run", "--count", "10") == 2
