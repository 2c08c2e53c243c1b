"""Loaders that are compared: ours, and four that people use, each in the fastest way we found.

Every side shuffles, decodes the same tars (streaming: its own format with the same bytes) and hands the
main process the same thing: batches of float32 images in [-1, 1] with their labels. Workers send
bytes, not floats, where that is faster. What is done once for a data set - an index, a conversion - is
done in `__init__` and not timed.
"""

import contextlib
import io
import itertools
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.loader_shards import Shards
from data_pipeline.indexes import update_catalogs
from data_pipeline.loader import Loader
from trainer.assembly import plan, training_stream
from trainer.recipe import build_recipe
from trainer.running import open_loader

Decoded = tuple[Tensor, Tensor]  # (batch, 3, size, size) float32 in [-1, 1]; (batch,) labels
Opened = Generator[Decoded, None, None]
SHUFFLED_TOGETHER = 256
SEED = 1
LANES = 8


@dataclass(frozen=True)
class Setting:
    """What is the same for all sides.

    batch: samples
    workers: threads, or processes, that decode
    """

    batch: int
    workers: int


class Side(Protocol):
    """A loader of some shards; making one raises ImportError where it is not installed."""

    name: str
    install: str

    def __init__(self, shards: Shards, setting: Setting) -> None: ...

    def open(self, state: Any) -> Opened:
        """Batches from the first on, or from where `state` was taken; closed by closing the iterator."""
        ...

    def state_after(self, batches: int) -> Any:
        """What `open` needs to go on after so many batches."""
        ...


class Flowmill:
    """Our loader."""

    name = "flowmill (DALI)"
    install = "pip install nvidia-dali-cuda120"
    decoder = "dali"

    def __init__(self, shards: Shards, setting: Setting) -> None:
        if self.decoder == "dali":
            import_module("nvidia.dali")
        update_catalogs(shards.pattern)
        data = {"train": shards.pattern, "image_size": shards.size, "classes": shards.samples}
        recipe = build_recipe(
            {
                "name": "loader",
                "seed": SEED,
                "run": {"dir": str(shards.folder / "run")},
                "data": data
                | {
                    "decoder": self.decoder,
                    "threads": setting.workers,
                    "window": SHUFFLED_TOGETHER,
                    "lanes": LANES,
                },
                "model": {"patch": shards.size, "width": 16, "depth": 1, "heads": 1},
                "train": {"samples": shards.samples, "batch": setting.batch},
            },
            "bench loader",
        )
        self._plan = plan(recipe, 1)

    def open(self, state: Any) -> Opened:
        with self.loader() as loader:
            if state is not None:
                loader.load_state_dict(state)
            for batch in loader:
                yield batch.image, batch.label

    def loader(self) -> Loader:
        """As the trainer opens it: shards and indexes are looked at anew, the model and its layout not."""
        made = replace(self._plan, stream=training_stream(self._plan.recipe))
        return open_loader(made, 0, 1, torch.device("cpu"))

    def state_after(self, batches: int) -> Any:
        return self._plan.stream.state_at(batches * self._plan.recipe.train.batch)


class FlowmillPillow(Flowmill):
    """The same where DALI is not."""

    name = "flowmill (pillow)"
    install = "part of this package"
    decoder = "pillow"


class WebDataset:
    """webdataset with its own decoding by pillow and torch's DataLoader; goes on by skipping, undecoded."""

    name = "webdataset + pillow"
    install = "pip install webdataset"

    def __init__(self, shards: Shards, setting: Setting) -> None:
        self.shards, self.setting = shards, setting

    def open(self, state: int | None) -> Opened:
        import webdataset

        dataset = webdataset.WebDataset(
            self.shards.tars, shardshuffle=len(self.shards.tars), seed=SEED
        ).shuffle(SHUFFLED_TOGETHER, seed=SEED)
        if state is not None:
            # Workers take batches in turn, so each has had its part of them.
            dataset = dataset.slice(state // self.setting.workers * self.setting.batch, None)
        dataset = dataset.decode("torchrgb8").to_tuple("jpg", "cls")
        dataset = dataset.batched(self.setting.batch, collation_fn=collate, partial=False)
        loader = DataLoader(dataset, batch_size=None, num_workers=self.setting.workers)
        return (to_floats(*pair) for pair in loader)

    def state_after(self, batches: int) -> int:
        return batches


class Dali:
    """DALI's own reader of tars, with the decoding and arithmetic inside its pipeline."""

    name = "DALI's webdataset reader"
    install = "pip install nvidia-dali-cuda120"

    def __init__(self, shards: Shards, setting: Setting) -> None:
        self._dali: Any = import_module("nvidia.dali")
        self._torch: Any = import_module("nvidia.dali.plugin.pytorch")
        creator_of: Any = import_module("wds2idx").IndexCreator
        self._indexes = [str(Path(tar).with_suffix(".idx")) for tar in shards.tars]
        for tar, index in zip(shards.tars, self._indexes, strict=True):
            with contextlib.redirect_stdout(io.StringIO()), creator_of(tar, index) as creator:
                creator.create_index()
        self.shards, self.setting = shards, setting

    def open(self, state: list[bytes] | None) -> Opened:
        iterator = self._iterator(state)
        while True:
            try:
                (found,) = next(iterator)
            except StopIteration:
                return
            yield found["image"], torch.tensor([int(bytes(row)) for row in found["cls"].numpy()])

    def state_after(self, batches: int) -> list[bytes]:
        iterator = self._iterator(None)
        for _ in range(batches):
            next(iterator)
        return list(iterator.checkpoints())

    def _iterator(self, state: list[bytes] | None) -> Any:
        fn, types = self._dali.fn, self._dali.types
        pipeline = self._dali.Pipeline(
            batch_size=self.setting.batch,
            num_threads=self.setting.workers,
            device_id=None,
            enable_checkpointing=True,
            checkpoint=state[0] if state else None,
        )
        with pipeline:
            jpeg, label = fn.readers.webdataset(
                paths=self.shards.tars,
                index_paths=self._indexes,
                ext=["jpg", "cls"],
                missing_component_behavior="error",
                random_shuffle=True,
                initial_fill=SHUFFLED_TOGETHER,
                seed=SEED,
                name="reader",
            )
            pixels = fn.decoders.image(jpeg, device="cpu", output_type=types.RGB)
            image = fn.crop_mirror_normalize(
                pixels,
                mean=[127.5] * 3,
                std=[127.5] * 3,
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            pipeline.set_outputs(image, fn.pad(label, fill_value=ord(" ")))
        return self._torch.DALIGenericIterator(
            [pipeline],
            ["image", "cls"],
            reader_name="reader",
            last_batch_policy=self._torch.LastBatchPolicy.PARTIAL,
        )


class Energon:
    """megatron-energon, decoding by pillow in its workers; goes on from its own saved state."""

    name = "megatron-energon"
    install = "pip install megatron-energon"

    def __init__(self, shards: Shards, setting: Setting) -> None:
        self._energon: Any = import_module("megatron.energon")
        # Its index lies among the tars.
        self._folder = shards.folder / "energon"
        self._folder.mkdir()
        for tar in shards.tars:
            (self._folder / Path(tar).name).hardlink_to(tar)
        command = "from megatron.energon.cli.main import main; main()"
        options = ["--non-interactive", "--split-parts", "train:.*"]
        options += ["--sample-type", "ImageClassificationSample"]
        options += ["--field-map", '{"image": "jpg", "label": "cls"}']
        subprocess.run(
            [sys.executable, "-c", command, "prepare", *options, str(self._folder)],
            check=True,
            capture_output=True,
        )
        self.shards, self.setting = shards, setting

    def open(self, state: Any) -> Opened:
        loader = self._loader()
        if state is not None:
            loader.restore_state_rank(state)
        return (to_floats(found.image, found.label) for found in loader)

    def state_after(self, batches: int) -> Any:
        loader = self._loader()
        for _ in itertools.islice(loader, batches):
            pass
        return loader.save_state_rank()

    def _loader(self) -> Any:
        energon = self._energon
        as_bytes = energon.SampleDecoder(image_decode="torchrgb8")
        encoder = type("AsBytes", (energon.DefaultTaskEncoder,), {"decoder": as_bytes})
        dataset = energon.get_train_dataset(
            str(self._folder),
            worker_config=energon.WorkerConfig(
                rank=0, world_size=1, num_workers=self.setting.workers
            ),
            batch_size=self.setting.batch,
            shuffle_buffer_size=SHUFFLED_TOGETHER,
            max_samples_per_sequence=100,
            task_encoder=encoder(),
        )
        return energon.get_savable_loader(dataset)


class Mosaic:
    """mosaicml-streaming on the same JPEG files in its own format; goes on from its own state."""

    name = "mosaicml-streaming"
    install = "pip install mosaicml-streaming"

    def __init__(self, shards: Shards, setting: Setting) -> None:
        self._streaming: Any = import_module("streaming")
        self._folder = str(shards.folder / "streaming")
        columns = {"image": "bytes", "label": "int"}
        with self._streaming.MDSWriter(out=self._folder, columns=columns) as writer:
            for number in range(shards.samples):
                jpeg = shards.jpegs[number % len(shards.jpegs)]
                writer.write({"image": jpeg, "label": number})
        self.setting = setting

    def open(self, state: Any) -> Opened:
        loader = self._loader()
        if state is not None:
            loader.load_state_dict(state)
        return (to_floats(*pair) for pair in loader)

    def state_after(self, batches: int) -> Any:
        loader = self._loader()
        next(iter(loader))
        return loader.dataset.state_dict(batches * self.setting.batch, from_beginning=True)

    def _loader(self) -> Any:
        self._streaming.base.util.clean_stale_shared_memory()
        dataset = self._streaming.StreamingDataset(
            local=self._folder, batch_size=self.setting.batch, shuffle=True, shuffle_seed=SEED
        )
        return self._streaming.StreamingDataLoader(
            dataset,
            batch_size=self.setting.batch,
            num_workers=self.setting.workers,
            collate_fn=collate_jpegs,
            drop_last=True,
        )


SIDES: tuple[type[Any], ...] = (Flowmill, FlowmillPillow, WebDataset, Dali, Energon, Mosaic)


def collate(samples: Sequence[tuple[Tensor, int]]) -> Decoded:
    """A batch of (3, height, width) uint8 images with their labels."""
    return torch.stack([image for image, _ in samples]), torch.tensor([n for _, n in samples])


def collate_jpegs(samples: Sequence[dict[str, Any]]) -> Decoded:
    """The same of undecoded samples, by pillow."""
    from PIL import Image

    images = [np.array(Image.open(io.BytesIO(sample["image"]))) for sample in samples]
    labels = torch.tensor([int(sample["label"]) for sample in samples])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels


def to_floats(pixels: Tensor, labels: Any) -> Decoded:
    """uint8 0 .. 255 to float32 -1 .. 1, in the main process."""
    return pixels.float().div_(127.5).sub_(1.0).contiguous(), torch.as_tensor(labels)
