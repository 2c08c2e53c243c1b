"""Decoding with DALI: on the GPU where there is one, else with its CPU operators."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from data_pipeline.decode.images import open_image, scale
from data_pipeline.decode.pillow import load
from flows.errors import UserError


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


class DaliDecoder:
    """See `Decoder`; the batch lies on `device`."""

    name = "dali"

    def __init__(
        self, *, image_size: int, channels: int, threads: int, device: torch.device
    ) -> None:
        self.image_size = image_size
        self.channels = channels
        self.threads = threads
        self.device = device
        self._pipeline: Any = None
        self._largest = 0

    def decode(
        self, encoded: Sequence[bytes], *, flip: NDArray[np.bool_], names: Sequence[str]
    ) -> Tensor:
        # DALI reads more kinds of image than pillow does alike, and would drop transparency.
        for content, name in zip(encoded, names, strict=True):
            open_image(content, name)
        try:
            return self._run(encoded, flip)
        except RuntimeError as error:
            raise self._culprit(encoded, names) from error

    def close(self) -> None:
        self._pipeline = None

    def _run(self, encoded: Sequence[bytes], flip: NDArray[np.bool_]) -> Tensor:
        pipeline = self._pipeline_for(len(encoded))
        pipeline.feed_input("encoded", [np.frombuffer(content, np.uint8) for content in encoded])
        pipeline.feed_input("flip", list(flip.astype(np.int32)))
        try:
            (pixels,) = pipeline.run()
        except RuntimeError:
            # A pipeline that met a bad image is dead.
            self.close()
            raise
        return self._to_torch(pixels)

    def _pipeline_for(self, batch: int) -> Any:
        """A pipeline for at most as many images as the largest batch so far."""
        if self._pipeline is None or batch > self._largest:
            self._largest = max(batch, self._largest)
            self._pipeline = self._build(self._largest)
        return self._pipeline

    def _build(self, batch: int) -> Any:
        on_gpu = self.device.type == "cuda"
        # The loader runs ahead in its own thread; DALI needs no queues of its own.
        pipeline = Pipeline(
            batch_size=batch,
            num_threads=self.threads,
            device_id=_device_id(self.device),
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            image = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB if self.channels == 3 else types.GRAY,
            )
            # Of DALI's filters the triangular one is nearest to pillow's bilinear.
            image = fn.resize(
                image,
                resize_shorter=self.image_size,
                subpixel_scale=False,
                interp_type=types.INTERP_TRIANGULAR,
            )
            image = fn.crop_mirror_normalize(
                image,
                crop=(self.image_size, self.image_size),
                rounding="truncate",
                mirror=flip,
                dtype=types.UINT8,
                output_layout="CHW",
            )
            pipeline.set_outputs(image)
        pipeline.build()
        return pipeline

    def _to_torch(self, pixels: Any) -> Tensor:
        if self.device.type != "cuda":
            return scale(torch.from_numpy(pixels.as_array()))
        image = scale(from_dlpack(pixels.as_tensor()))
        # DALI writes its next batch over these pixels: the copy has to be made by then. This waits
        # in the loader's thread, not in the step.
        torch.cuda.current_stream(self.device).synchronize()
        return image

    def _culprit(self, encoded: Sequence[bytes], names: Sequence[str]) -> UserError:
        """Which image DALI could not read: it does not say, so each is tried alone."""
        for content, name in zip(encoded, names, strict=True):
            try:
                self._run([content], np.zeros(1, np.bool_))
            except RuntimeError:
                # pillow says in a few words what is wrong with it, if it finds it wrong too.
                try:
                    load(content, name)
                except UserError as named:
                    return named
                return UserError(
                    f"{name}: DALI cannot decode its image, though pillow can; replace it, or set "
                    "data.decoder = pillow"
                )
        return UserError(
            f"{names[0]}: DALI failed on the batch that begins with this sample and on none of its "
            "images alone; set data.decoder = pillow"
        )
