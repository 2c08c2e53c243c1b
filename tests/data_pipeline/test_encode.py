"""Encoding: once, whatever is missing, the same on any number of ranks, never by a network from afar."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from data_pipeline.decode.decoder import decode_middle, open_decoder
from data_pipeline.description import UNFINISHED, Description, read_description
from data_pipeline.encode import Outcome, encode, open_job, read_records
from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.job import Settings
from data_pipeline.encoders.texts import TextEncoder
from data_pipeline.index import scan
from data_pipeline.latents import read_array, write_array
from data_pipeline.sources.archives import TarSource
from data_pipeline.storing import sha256_of
from data_pipeline.verify import draw_grid, verify
from flows.errors import UserError
from launch.commands.data import app
from tests import networks
from tests.data_pipeline.conftest import image_file, write_tar

# A `.npy` file of an object, which only unpickling could read.
PICKLE = io.BytesIO()
np.save(PICKLE, np.array([{}], object), allow_pickle=True)
CPU = torch.device("cpu")
SIDE = 8
PLAIN = Settings(
    image_size=SIDE, decoder="pillow", dtype="float32", precision="fp32", posterior="mean",
    max_tokens=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vae`, `other` (another autoencoder), `t5` and `clip`."""
    root = tmp_path_factory.mktemp("networks")
    networks.save_autoencoder(root / "vae")
    networks.save_autoencoder(root / "other", seed=1)
    networks.save_t5(root / "t5")
    networks.save_clip(root / "clip")
    return root


def test_shards_are_not_encoded_over_themselves(nets, sources, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    for out in (tmp_path / "data", f"{tmp_path}/other/../data/"):
        with pytest.raises(
            UserError, match=r"train-0\.tar: lies in the folder .* would be replaced"
        ):
            run(nets, sources, out)
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_an_interrupted_packing_is_not_encoded(nets, sources, tmp_path):
    (tmp_path / "data" / UNFINISHED).touch()
    with pytest.raises(UserError, match="flowmill data pack has not ended here"):
        run(nets, sources, tmp_path / "out")


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE + 2, 3), dtype=np.uint8)
    return image_file(pixels)


CAPTIONS = ["a cat", "", "a very long caption", "dog"]


@pytest.fixture
def sources(tmp_path: Path) -> str:
    """Three shards of 5, 3 and 4 samples with captions."""
    (tmp_path / "data").mkdir()
    number = 0
    for shard, size in enumerate((5, 3, 4)):
        members = []
        for _ in range(size):
            key = f"{number:04d}"
            members += [(f"{key}.png", picture(number)), (f"{key}.cls", str(number % 3).encode())]
            members += [(f"{key}.txt", CAPTIONS[number % 4].encode())]
            number += 1
        write_tar(tmp_path / "data" / f"train-{shard}.tar", members)
    return f"{tmp_path}/data/train-*.tar"


def run(
    nets: Path,
    pattern: str,
    out: Path | str,
    *,
    vae: str | None = "vae",
    text: str | None = None,
    rank: int = 0,
    ranks: int = 1,
    batch: int = 2,
    skip_bad: bool = False,
    device: torch.device = CPU,
    **changes: object,
) -> Outcome:
    job = open_job(
        [pattern], str(out), PLAIN.model_copy(update=changes),
        autoencoder=nets / vae if vae else None, text=str(nets / text) if text else None,
        threads=1, batch=batch, skip_bad=skip_bad, device=device,
    )  # fmt: skip
    return encode(job, rank=rank, ranks=ranks, report=lambda name, outcome: None)


def made(outcome: Outcome) -> list[str]:
    return [record.source.rpartition("/")[2] for record in outcome.made]


def described(out: Path) -> Description:
    found = read_description(str(out))
    assert found is not None
    return found


def content(out: Path) -> dict[str, str]:
    return {p.name: sha256_of(str(p)) for p in [*sorted(out.glob("*.tar")), out / "dataset.json"]}


def test_latents_and_embeddings_are_those_of_the_networks(
    nets: Path, sources: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(nets, sources, out, text="clip")
    old = TarSource(sources, label_field=None, caption_field=None)
    new = TarSource(f"{out}/*.tar", label_field=None, caption_field=None)
    assert len(new) == len(old) == 12
    vae = Autoencoder(nets / "vae", precision="fp32", device=CPU)
    clip = TextEncoder(nets / "clip", max_tokens=12, precision="fp32", device=CPU)
    decoder = open_decoder("pillow", channels=3, threads=1, device=CPU)
    raw = []
    for number in range(12):
        source, sample = old[number], new[number]
        image = decode_middle(decoder, [source.members["png"]], [""], (SIDE, SIDE))
        expected = vae.encode(image)[0][0].numpy()
        latent = read_array(sample.members["latent.npy"], "")
        np.testing.assert_allclose(latent, expected, rtol=0, atol=2e-6)
        embedded = clip.encode([source.members["txt"].decode()])
        text = read_array(sample.members["text.npy"], "")
        np.testing.assert_allclose(text, embedded.tokens[0].numpy(), rtol=0, atol=2e-6)
        assert embedded.pooled is not None
        pooled = read_array(sample.members["pooled.npy"], "")
        np.testing.assert_allclose(pooled, embedded.pooled[0].numpy(), rtol=0, atol=2e-6)
        assert sample.key == source.key
        kept = {name: source.members[name] for name in ("cls", "txt")}
        assert {n: c for n, c in sample.members.items() if not n.endswith("npy")} == kept
        raw.append(latent)
    about = described(out)
    assert about.latents is not None
    assert about.latents.shape == raw[0].shape == (4, SIDE // 2, SIDE // 2)
    assert (about.latents.scale, about.latents.shift) == (1.5, 0.1)
    pixels = np.stack(raw).transpose(1, 0, 2, 3).reshape(4, -1)
    np.testing.assert_allclose(about.latents.mean, pixels.mean(1), rtol=1e-5)
    np.testing.assert_allclose(about.latents.std, pixels.std(1), rtol=1e-5)
    assert about.texts is not None
    assert (about.texts.kind, about.texts.width, about.texts.pooled) == ("clip", 8, 8)
    assert sum(record.captions_cut for record in read_records(str(out))[1]) == 3
    for name, shard in about.shards.items():
        assert shard.sha256 == sha256_of(str(out / name))
        assert shard.samples == len(scan(str(out / name)))


def test_a_batch_changes_no_embedding(nets: Path) -> None:
    """T5 looks both ways, so padding that it could see would change it."""
    encoder = TextEncoder(nets / "t5", max_tokens=12, precision="fp32", device=CPU)
    together = encoder.encode(CAPTIONS)
    assert [len(tokens) for tokens in together.tokens] == [6, 1, 12, 4]
    assert (together.cut, together.pooled) == (1, None)
    for caption, tokens in zip(CAPTIONS, together.tokens, strict=True):
        np.testing.assert_allclose(encoder.encode([caption]).tokens[0], tokens, rtol=0, atol=2e-6)


def test_a_second_run_makes_only_what_is_missing(nets: Path, sources: str, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    assert made(run(nets, sources, out)) == ["train-0.tar", "train-1.tar", "train-2.tar"]
    first = content(out)
    assert made(run(nets, sources, out)) == []
    # Of a shard that is gone, one cut short, and one without its record, each is made again alike.
    (out / "train-0.tar").unlink()
    assert made(run(nets, sources, out)) == ["train-0.tar"]
    with (out / "train-2.tar").open("r+b") as file:
        file.truncate(1000)
    (out / ".encoded" / "train-1.tar.json").unlink()
    assert made(run(nets, sources, out)) == ["train-1.tar", "train-2.tar"]
    (out / "dataset.json").unlink()
    assert made(run(nets, sources, out)) == []
    assert content(out) == first
    # The same bytes elsewhere, or with another time, are the same content; other bytes are not.
    shutil.copytree(data, tmp_path / "moved")
    assert made(run(nets, f"{tmp_path}/moved/*.tar", out)) == []
    shutil.copyfile(data / "train-0.tar", data / "train-1.tar")
    assert made(run(nets, sources, out)) == ["train-1.tar"]
    assert content(out)["train-1.tar"] == first["train-0.tar"]
    shutil.copyfile(data / "train-0.tar", data / "train-3.tar")
    assert made(run(nets, sources, out)) == ["train-3.tar"]
    assert list(described(out).shards) == [f"train-{n}.tar" for n in range(4)]


def test_other_networks_or_options_make_all_anew(nets: Path, sources: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(nets, sources, out)
    base = content(out)
    for changes in (
        {"vae": "other"},
        {"dtype": "float16"},
        {"posterior": "sample"},
        {"text": "t5"},
    ):
        assert len(made(run(nets, sources, out, **changes))) == 3
        assert content(out).items().isdisjoint(base.items())
        assert made(run(nets, sources, out, **changes)) == []
    assert len(made(run(nets, sources, out))) == 3
    assert content(out) == base
    # Shards of two kinds in one folder would be trained on as if they were one.
    with pytest.raises(UserError, match=r"train-1\.tar: was encoded by other networks or options"):
        run(nets, f"{tmp_path}/data/train-0.tar", out, vae="other")
    assert content(out) == base


def test_ranks_share_the_shards_and_make_the_same(nets: Path, sources: str, tmp_path: Path) -> None:
    run(nets, sources, tmp_path / "one")
    shares = []
    for rank in (3, 1, 0, 2):
        assert read_description(str(tmp_path / "four")) is None
        shares.append(made(run(nets, sources, tmp_path / "four", rank=rank, ranks=4)))
    # Rank 3 has no shard, and the last rank to end describes the whole.
    assert shares == [[], ["train-1.tar"], ["train-0.tar"], ["train-2.tar"]]
    assert content(tmp_path / "four") == content(tmp_path / "one")


def test_a_run_cut_short_leaves_whole_shards_or_none(
    nets: Path, sources: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(nets, sources, tmp_path / "whole")
    broken = tmp_path / "data" / "train-1.tar"
    good = broken.read_bytes()
    with tarfile.open(broken, "a") as archive:
        member = tarfile.TarInfo("9999.png")
        archive.addfile(member)
    with pytest.raises(UserError, match=r"train-1\.tar: sample 9999: its image \(0 bytes\)"):
        run(nets, sources, out)
    assert [path.name for path in sorted(out.iterdir())] == [".encoded", "train-0.tar"]
    with pytest.raises(UserError, match="some shards are not encoded yet"):
        read_records(str(out))
    broken.write_bytes(good)
    assert made(run(nets, sources, out)) == ["train-1.tar", "train-2.tar"]
    assert content(out) == content(tmp_path / "whole")


def test_bad_samples_stop_the_run_or_are_left_out_and_listed(nets: Path, tmp_path: Path) -> None:
    members = []
    for number in range(5):
        members += [(f"{number}.png", picture(number)), (f"{number}.txt", b"a")]
    bad = {
        "no image": ("no image members", [m for m in members if m[0] != "2.png"]),
        "two images": ("2 image members", [*members, ("2.jpg", b"")]),
        "damaged": ("its image", [*members[:4], ("2.png", picture(2)[:90]), *members[5:]]),
        "no caption": ("no caption", [m for m in members if m[0] != "2.txt"]),
        "other letters": ("not UTF-8", [*members[:5], ("2.txt", b"\xff"), *members[6:]]),
    }
    for name, (words, broken) in bad.items():
        url = write_tar(tmp_path / f"{name}.tar", broken)
        with pytest.raises(UserError, match=rf"sample 2\b.*{words}"):
            run(nets, url, tmp_path / name, text="t5")
        run(nets, url, tmp_path / name, text="t5", skip_bad=True)
        left = scan(str(tmp_path / name / f"{name}.tar"))
        assert left.keys.tolist() == ["0", "1", "3", "4"]
        (record,) = read_records(str(tmp_path / name))[1]
        assert record.shard.samples == 4
        assert len(record.dropped) == 1
        assert words in record.dropped[0]


def test_a_sampled_latent_belongs_to_its_key(nets: Path, sources: str, tmp_path: Path) -> None:
    def latents(out: Path) -> dict[str, np.ndarray]:
        found = TarSource(f"{out}/*.tar", label_field=None, caption_field=None)
        samples = [found[number] for number in range(len(found))]
        return {s.key: read_array(s.members["latent.npy"], "") for s in samples}

    run(nets, sources, tmp_path / "mean")
    run(nets, sources, tmp_path / "a", posterior="sample")
    run(nets, f"{tmp_path}/data/train-1.tar", tmp_path / "b", posterior="sample", batch=3)
    mean, a, b = (latents(tmp_path / name) for name in ("mean", "a", "b"))
    for key, latent in b.items():
        np.testing.assert_allclose(latent, a[key], rtol=0, atol=2e-6)
    vae = Autoencoder(nets / "vae", precision="fp32", device=CPU)
    decoder = open_decoder("pillow", channels=3, threads=1, device=CPU)
    images = [picture(number) for number in range(12)]
    pixels = decode_middle(decoder, images, [""] * 12, (SIDE, SIDE))
    std = vae.encode(pixels)[1].numpy()
    noise = np.stack([a[key] - mean[key] for key in sorted(a)]) / std
    # 768 normal numbers: five standard errors.
    assert abs(noise.mean()) < 5 / 768**0.5
    assert abs(noise.std() - 1) < 5 / (2 * 768) ** 0.5


def test_encoding_to_and_from_other_storage(nets: Path, sources: str, tmp_path: Path) -> None:
    import fsspec

    run(nets, sources, tmp_path / "out")
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/data/", "/far/", recursive=True)
    assert len(made(run(nets, "memory://far/train-*.tar", "memory://made"))) == 3
    assert made(run(nets, "memory://far/train-*.tar", "memory://made")) == []
    for name, checksum in content(tmp_path / "out").items():
        assert sha256_of(f"memory://made/{name}") == checksum
    memory.rm("/far", recursive=True)
    memory.rm("/made", recursive=True)


def test_no_network_is_asked_for_anything(
    nets: Path, sources: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a folder has the name of a published model and lacks a file."""

    def refuse(*_: object) -> None:
        raise AssertionError("something tried to reach a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run(nets, sources, tmp_path / "out", text="clip")
    monkeypatch.chdir(tmp_path)
    for name in ("openai/clip", "google/t5"):
        shutil.copytree(nets / name.partition("/")[2], name)
        (tmp_path / name / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=f"{name}: the text encoder cannot be loaded"):
            TextEncoder(Path(name), max_tokens=8, precision="fp32", device=CPU)


def test_networks_that_are_not_whole_or_not_safe_are_refused(nets: Path, tmp_path: Path) -> None:
    def vae(folder: Path) -> None:
        Autoencoder(folder, precision="fp32", device=CPU)

    with pytest.raises(UserError, match=r"absent: is no folder with a config\.json"):
        vae(tmp_path / "absent")
    with pytest.raises(UserError, match=r"t5: holds None; give the folder of a diffusers"):
        vae(nets / "t5")
    with pytest.raises(UserError, match="holds None; give the folder of a T5 or CLIP"):
        TextEncoder(nets / "vae", max_tokens=8, precision="fp32", device=CPU)
    with pytest.raises(UserError, match="reads at most 12 tokens, not 77"):
        TextEncoder(nets / "clip", max_tokens=77, precision="fp32", device=CPU)
    shutil.copytree(nets / "vae", tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    # A network that lacks weights would be filled with random ones, and say so in a log line alone.
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"its weights lack encoder\.conv_in\.weight"):
        vae(tmp_path / "vae")
    weights.write_bytes(b"\x10")
    with pytest.raises(UserError, match="the autoencoder cannot be loaded"):
        vae(tmp_path / "vae")
    weights.unlink()
    torch.save({}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no \.safetensors weights, and other formats can run"):
        vae(tmp_path / "vae")


def test_the_command(nets: Path, sources: str, tmp_path: Path) -> None:
    def command(*words: str) -> str:
        result = CliRunner().invoke(app, ["encode", *words])
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    out = str(tmp_path / "out")
    nets_given = (
        "--autoencoder",
        str(nets / "vae"),
        "--text",
        str(nets / "t5"),
        "--max-tokens",
        "6",
    )
    found = json.loads(command(sources, out, *nets_given, "--image-size", "8", "--json"))
    assert (found["latents"]["shape"], found["texts"]["kind"]) == ([4, 4, 4], "t5")
    assert (found["captions_cut"], found["dropped"], len(found["shards"])) == (3, [], 3)
    assert "data.image_size=4" in command(sources, out, *nets_given, "--image-size", "8")
    # A recipe names both its train and its held-out shards.
    digits = str(tmp_path / "digits")
    grey_vae = networks.save_autoencoder(tmp_path / "grey", image_channels=1)
    found = json.loads(
        command("digits8", digits, "--autoencoder", str(grey_vae), "--json", "--batch", "256")
    )
    assert set(found["shards"]) == {"train-000000.tar", "train-000001.tar", "heldout-000000.tar"}
    assert found["latents"]["shape"] == [4, 4, 4]
    for words, message in {
        (sources, out): "nothing to encode by",
        (sources, out, *nets_given): "--image-size None does not divide",
        (sources, out, *nets_given, "--image-size", "9"): "give a multiple of 2",
    }.items():
        with pytest.raises(UserError, match=message):
            command(*words)
    two = tmp_path / "two"
    two.mkdir()
    shutil.copyfile(tmp_path / "data" / "train-0.tar", two / "train-0.tar")
    both = f"{tmp_path}/{{two,data}}/train-0.tar"
    with pytest.raises(UserError, match=r"2 of the shards are called train-0\.tar"):
        command(both, out, *nets_given, "--image-size", "8")


def test_text_alone_leaves_the_images(nets: Path, tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [("0.png", b"any"), ("0.cls", b"1"), ("0.txt", b"a")])
    run(nets, url, tmp_path / "out", vae=None, text="t5")
    (sample,) = TarSource(f"{tmp_path}/out/a.tar", label_field=None, caption_field=None).read([0])
    assert sorted(sample.members) == ["cls", "png", "text.npy", "txt"]
    assert sample.members["png"] == b"any"
    assert described(tmp_path / "out").latents is None


def test_verify_looks_into_latents_and_embeddings(nets: Path, sources: str, tmp_path: Path) -> None:
    out, image = tmp_path / "out", tmp_path / "grid.png"
    run(nets, sources, out, text="clip")
    report = verify(f"{out}/*.tar", classes=3)
    assert (report.problems, report.checksums, report.samples, report.captions) == ([], 3, 12, 12)
    latents = described(out).latents
    assert latents is not None
    np.testing.assert_allclose(report.moments["latent.npy"].mean, latents.mean, rtol=1e-9)
    np.testing.assert_allclose(report.moments["latent.npy"].std, latents.std, rtol=1e-9)
    draw_grid(f"{out}/*.tar", image)
    assert np.asarray(Image.open(image))[4:60, 4:60].std() > 30
    damaged = {
        "0000.latent.npy": write_array(np.zeros((4, 4, 3), np.float32)),
        "0001.latent.npy": write_array(np.full((4, 4, 4), np.nan, np.float32)),
        "0002.latent.npy": write_array(np.zeros((4, 4, 4), np.float32))[:-1],
        "0003.text.npy": write_array(np.zeros((13, 8), np.float32)),
        "0004.pooled.npy": PICKLE.getvalue(),
    }
    with tarfile.open(out / "train-0.tar") as archive:
        old = [(m.name, archive.extractfile(m)) for m in archive.getmembers()]
        members = [(name, damaged.get(name) or file.read()) for name, file in old if file]
    write_tar(out / "train-0.tar", members)
    problems = verify(f"{out}/*.tar", classes=3).problems
    expected = [
        "train-0.tar: its content is not what dataset.json says (sha256)",
        "sample 0000: latent.npy has shape (4, 4, 3), which dataset.json does not describe",
        "sample 0001: latent.npy has numbers that are not finite",
        "sample 0002: latent.npy: its array (383 bytes) is damaged",
        "sample 0003: text.npy has shape (13, 8), which dataset.json does not describe",
        "sample 0004: pooled.npy: its array",
    ]
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem


@pytest.mark.slow
def test_ranks_of_the_command_line(nets: Path, sources: str, tmp_path: Path) -> None:
    """Two processes that know of each other by RANK and WORLD_SIZE alone."""
    run(nets, sources, tmp_path / "one")
    words = ["data", "encode", sources, "two", "--autoencoder", str(nets / "vae"), "--batch", "2"]
    words += [
        "--image-size",
        "8",
        "--max-tokens",
        "12",
        "--decoder",
        "pillow",
        "--ranks",
        "2",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for line in ("2 of 2 shards (2 made, 0 kept)", "2 of 2 shards (0 made, 2 kept)"):
        done = subprocess.run(
            [sys.executable, "-m", "launch", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert f"rank 0: train-2.tar, {line}" in done.stderr
        assert len(json.loads(done.stdout)["shards"]) == 3
        assert content(tmp_path / "two") == content(tmp_path / "one")
    log = (tmp_path / "two" / "logs" / "rank-1.log").read_text()
    assert "rank 1: train-1.tar, 1 of 1 shards (1 made, 0 kept)" in log


@pytest.mark.gpu
def test_a_gpu_encodes_as_the_cpu_does(nets: Path, sources: str, tmp_path: Path) -> None:
    for name, device in (("cpu", CPU), ("gpu", torch.device("cuda"))):
        run(nets, sources, tmp_path / name, text="t5", posterior="sample", device=device)
    cpu, gpu = (
        TarSource(f"{tmp_path}/{name}/*.tar", label_field=None, caption_field=None)
        for name in ("cpu", "gpu")
    )
    for number in range(len(cpu)):
        for member in ("latent.npy", "text.npy"):
            a, b = (read_array(s[number].members[member], "") for s in (cpu, gpu))
            # TF32 convolutions keep ten bits.
            np.testing.assert_allclose(a, b, rtol=0, atol=5e-3)
