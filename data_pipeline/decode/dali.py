"""Decoding with DALI: on the GPU where there is one, else with its CPU decoders.

What is random reaches DALI as numbers, an image at a time: it draws none itself. On a GPU DALI does
all of it there. On the CPU it decodes the regions that are seen; where none of them is resized it also
normalises them, to the same bits, and the batch lies in its memory; else `finish` does the rest, whose
resizing is the faster one.

Only plain images go to DALI. The others (see `Picture`), and those on which DALI fails, are decoded
by pillow into the same batch, so what comes out does not depend on the decoder. A pipeline that met
a bad image is dead and does not say which it was: then each image is tried alone.
"""

import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from data_pipeline.augment import Views
from data_pipeline.decode.finish import HALF, finish
from data_pipeline.decode.images import BadImages, Picture, read_pictures
from data_pipeline.decode.pillow import PillowDecoder


class Part(NamedTuple):
    """Some images of a batch, at `places` in it, as DALI's pipeline hands them over.

    finished: they are what the batch wants; else they are pixels of regions
    """

    places: Sequence[int]
    decoded: Any
    finished: bool


class Own(threading.local):
    """What each thread has of its own: finished -> pipeline, for at most `largest` images."""

    def __init__(self) -> None:
        self.pipelines: dict[bool, Any] = {}
        self.largest = 0


class DaliDecoder:
    """See `Decoder`; the batch lies on `device`.

    redecoded: images that DALI could not decode and pillow could
    """

    name = "dali"

    def __init__(self, *, channels: int, threads: int, device: torch.device) -> None:
        self.channels = channels
        self.threads = threads
        self.device = device
        self.redecoded = 0
        self._on_gpu = device.type == "cuda"
        self._pillow = PillowDecoder(channels=channels, threads=threads, pinned=self._on_gpu)
        # A pipeline runs one batch at a time: each thread that decodes has its own, so that while one
        # hands over a batch another decodes.
        self._own = Own()
        # Copies out of DALI's memory do not queue behind the training step's work.
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None

    def open(self, contents: Sequence[bytes], names: Sequence[str]) -> list[Picture]:
        return read_pictures(contents, names)

    def decode(self, pictures: Sequence[Picture], views: Views) -> Tensor:
        mine = [place for place, picture in enumerate(pictures) if self._takes(picture)]
        with torch.cuda.stream(self._stream):
            parts, failed = self._decode_all(pictures, views, mine)
            others = sorted({*range(len(pictures))}.difference(mine).union(failed))
            if len(parts) == 1 and parts[0].finished and not others and not self._on_gpu:
                return from_dlpack(parts[0].decoded.as_tensor())
            # Only now: by this time the trainer has left the memory of an earlier batch, still cached.
            batch = self._empty((len(pictures), self.channels, *views.size))
            for part in parts:
                self._fill(batch, views, part)
            if others:
                self._fill_with_pillow(batch, pictures, views, others)
        self._note(pictures, failed)
        if self._stream is not None:
            batch.record_stream(torch.cuda.default_stream(self.device))
        return batch

    def close(self) -> None:
        self._own = Own()
        self._pillow.close()

    def _takes(self, picture: Picture) -> bool:
        # DALI would take the brightness of coloured JPEGs as it is stored, which rounds otherwise.
        return picture.plain and (self.channels == 3 or picture.mode == "L")

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        if self._on_gpu:
            return torch.empty(shape, device=self.device)
        return self._pillow.buffers.take(shape)

    def _decode_all(
        self, pictures: Sequence[Picture], views: Views, places: Sequence[int]
    ) -> tuple[list[Part], list[int]]:
        """What DALI makes of the pictures at `places`, and which of them it cannot decode."""
        if not places:
            return [], []
        chosen = views[places]
        finished = self._on_gpu or bool((chosen.region[:, 2:] == chosen.size).all())
        try:
            decoded = self._run([pictures[place].content for place in places], chosen, finished)
        except RuntimeError:
            del self._own.pipelines[finished]
            if len(places) == 1:
                return [], list(places)
        else:
            return [Part(places, decoded, finished)], []
        alone = [self._decode_all(pictures, views, [place]) for place in places]
        return [part for parts, _ in alone for part in parts], [p for _, bad in alone for p in bad]

    def _fill(self, batch: Tensor, views: Views, part: Part) -> None:
        """Write a part into its rows of the batch."""
        if part.finished:
            self._place(batch, part.places, from_dlpack(part.decoded.as_tensor()))
            return
        rows = batch.numpy()

        def work(numbers: Sequence[int]) -> None:
            for number in numbers:
                place = part.places[number]
                flip = bool(views.flip[place])
                finish(np.asarray(part.decoded[number]), flip=flip, row=rows[place])

        self._pillow.share(work, range(len(part.places)))

    def _fill_with_pillow(
        self, batch: Tensor, pictures: Sequence[Picture], views: Views, places: Sequence[int]
    ) -> None:
        if not self._on_gpu:
            self._pillow.fill(batch, pictures, views, places)
            return
        try:
            part = self._pillow.decode([pictures[place] for place in places], views[places])
        except BadImages as error:
            raise BadImages({places[n]: bad for n, bad in error.errors.items()}) from None
        self._place(batch, places, part.to(self.device, non_blocking=True))

    def _place(self, batch: Tensor, places: Sequence[int], part: Tensor) -> None:
        """Copy rows into a batch, out of memory that is used again afterwards."""
        batch[torch.tensor(places, device=self.device)] = part
        if self._on_gpu:
            # This waits in the loader's thread, not in the step.
            torch.cuda.current_stream(self.device).synchronize()

    def _note(self, pictures: Sequence[Picture], failed: Sequence[int]) -> None:
        if failed and not self.redecoded:
            warnings.warn(
                f"{pictures[failed[0]].name}: DALI cannot decode its image and pillow can, as it "
                "did now and will for any other; data.decoder = pillow never tries DALI",
                stacklevel=2,
            )
        self.redecoded += len(failed)

    def _run(self, contents: Sequence[bytes], views: Views, finished: bool) -> Any:
        """What DALI makes of some images; raises RuntimeError if it fails on any of them."""
        pipeline = self._pipeline_for(len(contents), finished)
        # DALI reads these where they lie, until `run` returns.
        encoded = [np.frombuffer(content, np.uint8) for content in contents]
        pipeline.feed_input("encoded", encoded)
        pipeline.feed_input("start", np.ascontiguousarray(views.region[:, :2]))
        pipeline.feed_input("shape", np.ascontiguousarray(views.region[:, 2:]))
        if self._on_gpu:
            size = np.array([views.size], np.float32)
            pipeline.feed_input("size", size.repeat(len(contents), 0))
        if finished:
            pipeline.feed_input("flip", views.flip.astype(np.int32))
        (decoded,) = pipeline.run()
        return decoded

    def _pipeline_for(self, batch: int, finished: bool) -> Any:
        """This thread's pipeline for at most as many images as its largest batch so far."""
        own = self._own
        if batch > own.largest:
            own.largest, own.pipelines = batch, {}
        if finished not in own.pipelines:
            own.pipelines[finished] = build_pipeline(
                self.device, own.largest, self.channels, self.threads, finished=finished
            )
        return own.pipelines[finished]


def build_pipeline(
    device: torch.device, batch: int, channels: int, threads: int, *, finished: bool
) -> Any:
    """Regions of images: (height, width, channels) uint8; or `finished`, mirrored and normalised
    (channels, height, width) float32, and on a GPU resized before."""
    on_gpu = device.type == "cuda"
    # The loader runs ahead in a thread of its own; DALI needs no queue.
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=_device_id(device),
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    with pipeline:
        # What each decoder reads of EXIF may differ: pictures that need turning do not come here.
        image = fn.decoders.image_slice(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True),
            start=fn.external_source(name="start", dtype=types.INT32, ndim=1),
            shape=fn.external_source(name="shape", dtype=types.INT32, ndim=1),
            axes=[0, 1],
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB if channels == 3 else types.GRAY,
            adjust_orientation=False,
            # As libjpeg spreads chroma on the CPU.
            jpeg_fancy_upsampling=True,
            # Ranks of a node do not pin their threads to the same cores.
            affine=False,
        )
        if on_gpu:
            image = _resize(image)
        pipeline.set_outputs(_normalise(image, channels) if finished else image)
    pipeline.build()
    return pipeline


def _resize(image: Any) -> Any:
    """As `finish` resizes, to within rounding: of DALI's filters the triangle is the same."""
    return fn.resize(
        image,
        size=fn.external_source(name="size", dtype=types.FLOAT, ndim=1),
        interp_type=types.INTERP_TRIANGULAR,
        subpixel_scale=False,
    )


def _normalise(image: Any, channels: int) -> Any:
    """As `finish` does, to the bit: a number less the mean, which is exact, times the inverse."""
    return fn.crop_mirror_normalize(
        image,
        mirror=fn.external_source(name="flip", dtype=types.INT32, ndim=0),
        mean=[float(HALF)] * channels,
        std=[float(HALF)] * channels,
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
