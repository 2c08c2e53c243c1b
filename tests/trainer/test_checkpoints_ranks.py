"""A checkpoint belongs to the run, not to the layout: what any ranks saved, any others load, bit
by bit.

Values are small and whole numbers tell where they belong, so an element that lands elsewhere is
seen.
"""

import hashlib
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from flows.errors import UserError
from parallel.pieces import FlatPiece, local_part
from tests.distributed.harness import RankFailed, run_ranks
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.store import damage, latest_whole, list_checkpoints, load, save

STATE = {"step": 5, "position": 1234}


def values():
    """Odd sizes, fewer rows than ranks, no rows, no dimensions, several dtypes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.w": torch.randn(7, 6, generator=generator),
        "model.cube": torch.randn(5, 8, 3, generator=generator),
        "model.b": torch.randn(3, generator=generator),
        "optimizer.w.exp_avg": torch.randn(7, 6, generator=generator),
        "optimizer.w.step": torch.tensor(17.0),
        "count": torch.arange(11),
        "half": torch.randn(4, 4, generator=generator).bfloat16(),
        "row": torch.randn(1, 4, generator=generator),
        "none": torch.zeros(0, 4),
    }


def layouts(world_size):
    """Layout -> tensor -> the same tensor placed by that layout."""
    line = init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))

    def placed(mesh, *placements):
        def place(tensor):
            enough = all(not p.is_shard() or p.dim < tensor.ndim for p in placements)
            if tensor.ndim == 0 or not enough:
                return tensor.clone()  # as the optimizer's step: a replica
            return distribute_tensor(tensor, mesh, placements)

        return place

    found = {
        "plain": torch.clone,
        "rows": placed(line, Shard(0)),
        "columns": placed(line, Shard(1)),
        "replicas": placed(line, Replicate()),
        "flat": lambda tensor: flat_piece(tensor, line.get_local_rank(), world_size),
    }
    if world_size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found["hsdp"] = placed(square, Replicate(), Shard(0))
        found["grid"] = placed(square, Shard(0), Shard(1))
    return found


def flat_piece(tensor, rank, world_size):
    """A run of elements whose ends are anywhere in a row; the last rank holds least, or nothing."""
    length = -(-(tensor.numel() + 1) // world_size)
    begin, end = (min(tensor.numel(), n * length) for n in (rank, rank + 1))
    return FlatPiece(tensor.flatten()[begin:end].clone(), tensor.shape, begin)


def assert_equal(found, expected):
    for name, value in expected.items():
        tensor = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
        if isinstance(tensor, FlatPiece):
            value = value.flatten()[tensor.start : tensor.start + len(tensor.local)]
            tensor = tensor.local
        assert torch.equal(tensor, value), name


def load_into_all(ranks, checkpoint):
    for layout, place in layouts(ranks.world_size).items():
        targets = {name: place(torch.zeros_like(value)) for name, value in values().items()}
        assert load(checkpoint, targets) == STATE, layout
        assert_equal(targets, values())


def save_in_all(ranks, folder):
    paths = []
    for layout, place in layouts(ranks.world_size).items():
        tensors = {name: place(value) for name, value in values().items()}
        paths.append(save(folder / layout, step=5, tensors=tensors, state=STATE, keep=1))
    return paths


def on_ranks(ranks, folder):
    """Load what others saved, save in every layout, load each into each."""
    for other in sorted(folder.glob("by-*/*/step-00000005")):
        load_into_all(ranks, other)
    dist.barrier()
    for path in save_in_all(ranks, folder / f"by-{ranks.world_size}"):
        assert damage(path) is None
        load_into_all(ranks, path)
    if ranks.world_size == 4:
        on_strided_shards(folder / "strided")
        on_a_full_disk(ranks, folder / "full")
        when_one_rank_differs(ranks, folder / "by-4" / "rows" / "step-00000005")
        on_a_damaged_newest(ranks, folder / "damaged")
    else:
        with_bounded_memory(ranks, folder / "memory")
    return True


def on_strided_shards(folder):
    """Rows cut over tensor-parallel ranks first and over FSDP ranks then, as their composition
    does.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    whole = torch.arange(48.0).view(8, 6)
    by_tp = DTensor.from_local(whole.chunk(2)[mesh.get_local_rank("tp")], mesh["tp"], [Shard(0)])
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(by_tp)
    fully_shard(module, mesh=mesh["shard"])
    assert any(isinstance(p, _StridedShard) for p in module.weight.placements)
    path = save(folder, step=1, tensors={"w": module.weight}, state={}, keep=1)
    target = {"w": torch.zeros(8, 6)}
    load(path, target)
    assert torch.equal(target["w"], whole)
    with torch.no_grad():
        module.weight.to_local().zero_()
    load(path, {"w": module.weight})
    assert torch.equal(module.weight.to_local(), whole.view(4, 2, 6)[local_box(mesh)])


def local_box(mesh):
    """Where this rank's two rows are: tp chooses the half, shard the quarter in it."""
    return mesh.get_local_rank("tp") * 2 + mesh.get_local_rank("shard")


def on_a_full_disk(ranks, folder):
    """One rank may write no more: all raise its sentence, soon, and the older checkpoint is as it
    was.
    """
    mesh = init_device_mesh("cpu", (4,))
    tensors = {"w": distribute_tensor(torch.randn(4, 1 << 16), mesh, [Shard(0)])}
    first = save(folder, step=1, tensors=tensors, state={}, keep=1)
    before = fingerprint(first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    begun = time.monotonic()
    with pytest.raises(UserError) as refused:
        save(folder, step=2, tensors=tensors, state={}, keep=1)
    assert time.monotonic() - begun < 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentences = [None] * 4
    dist.all_gather_object(sentences, str(refused.value))
    assert len(set(sentences)) == 1
    assert "step 2 was not written: rank 2 failed on " in sentences[0]
    assert ".writing-00000002/shard-00002.safetensors (File too large)" in sentences[0]
    assert latest_whole(folder) == first
    assert fingerprint(first) == before
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    dist.barrier()
    assert save(folder, step=2, tensors=tensors, state={}, keep=1) == latest_whole(folder)


def fingerprint(path):
    return {file.name: hashlib.sha256(file.read_bytes()).digest() for file in path.iterdir()}


def when_one_rank_differs(ranks, checkpoint):
    """What one rank refuses, all refuse alike; tensors that ranks share out are accepted."""
    targets = {name: torch.zeros_like(value) for name, value in values().items()}
    if ranks.rank == 1:
        targets["model.w"] = torch.zeros(7, 5)
    with pytest.raises(UserError, match=r"tensor model\.w is F32 \[7, 6\]"):
        load(checkpoint, targets)
    mine = {name: torch.zeros_like(value) for name, value in values().items()}
    dealt = {name: mine[name] for name in sorted(mine)[ranks.rank :: ranks.world_size]}
    assert load(checkpoint, dealt) == STATE
    assert_equal(dealt, {name: values()[name] for name in dealt})
    dealt.pop("count", None)
    with pytest.raises(UserError, match=r"tensor count is in the checkpoint and not in this model"):
        load(checkpoint, dealt)


def on_a_damaged_newest(ranks, folder):
    """The file damaged is one that a single rank reads; all ranks turn to the one before."""
    mesh = init_device_mesh("cpu", (4,))
    tensors = {"w": distribute_tensor(torch.randn(4, 8), mesh, [Shard(0)])}
    first = save(folder, step=1, tensors=tensors, state={}, keep=2)
    second = save(folder, step=2, tensors=tensors, state={}, keep=2)
    if ranks.rank == 0:
        with (second / "shard-00003.safetensors").open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x00\x01")
            stream.truncate((first / "shard-00003.safetensors").stat().st_size)
    dist.barrier()
    assert "shard-00003.safetensors does not match its checksum" in damage(second)
    assert latest_whole(folder) == first


def with_bounded_memory(ranks, folder):
    """Neither saving nor loading takes more than a piece of a tensor besides the rank's own."""
    mesh = init_device_mesh("cpu", (2,))
    rows = {f"t{i}": torch.full((1 << 12, 1 << 9), float(i)) for i in range(8)}  # 8 MiB each
    tensors = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in rows.items()}
    columns = {name: distribute_tensor(value, mesh, [Shard(1)]) for name, value in rows.items()}
    pieces = {name: flat_piece(value, ranks.rank, 2) for name, value in rows.items()}
    del rows
    for target in (*columns.values(), *pieces.values()):
        local_part(target).zero_()
    with watched_memory() as peak:
        path = save(folder, step=1, tensors=tensors, state={}, keep=1)
        load(path, columns)
        load(path, pieces)
        load(save(folder, step=2, tensors=pieces, state={}, keep=1), columns)
    for held in (columns, pieces):
        assert all(bool((local_part(held[f"t{i}"]) == i).all()) for i in range(8))
    # A rank's share is 32 MiB, the whole 64 MiB; a piece that is copied 2 to 4 MiB.
    assert peak() < 16 * 2**20, f"{peak() / 2**20:.0f} MiB more at the peak"


class watched_memory:
    """Anonymous memory of this process, looked at every half millisecond; files' pages do not
    count.
    """

    def __enter__(self):
        self.begun = self.largest = self.now()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return lambda: self.largest - self.begun

    def __exit__(self, *error):
        self.running = False
        self.thread.join()

    def watch(self):
        while self.running:
            self.largest = max(self.largest, self.now())
            time.sleep(0.0005)

    def now(self):
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved by one process, by two ranks and by four; each wave loads what the waves before
    saved.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder / "by-1" / "plain", step=5, tensors=values(), state=STATE, keep=1)
    for world_size in (2, 4):
        assert all(run_ranks(on_ranks, world_size, folder=folder))
    return folder


def test_one_process_loads_what_any_layout_saved(folder):
    saved = sorted(folder.glob("by-*/*/step-00000005"))
    assert len(saved) == 1 + 5 + 7
    for path in saved:
        targets = {name: torch.full_like(value, 9) for name, value in values().items()}
        assert load(path, targets) == STATE
        assert_equal(targets, values())


def test_every_element_is_written_once_and_by_all_ranks(folder):
    elements = sum(value.numel() for value in values().values())
    for path in folder.glob("by-4/*/step-00000005"):
        manifest = read_manifest(path)
        chunks = [chunk for entry in manifest.tensors.values() for chunk in entry.chunks]
        assert sum(torch.Size(chunk.sizes).numel() for chunk in chunks) == elements
        assert len(manifest.files) == 4
    assert manifest.layout.startswith("4 ranks")
    assert read_manifest(folder / "by-4/hsdp/step-00000005").layout == (
        "4 ranks, mesh replicate=2 shard=2"
    )


def die_while_writing(ranks, folder):
    """Save whole, then save again and die on rank 1 once a part of its file is on disk."""
    mesh = init_device_mesh("cpu", (2,))
    tensors = {
        f"t{i}": distribute_tensor(torch.ones(2, 1 << 20), mesh, [Shard(0)]) for i in range(3)
    }
    save(folder, step=1, tensors=tensors, state={"step": 1}, keep=1)
    if ranks.rank == 1:
        threading.Thread(target=die_at, args=(folder / ".writing-00000002",), daemon=True).start()
    save(folder, step=2, tensors=tensors, state={"step": 2}, keep=1)
    raise AssertionError("rank 1 lived")


def die_at(writing):
    shard = writing / "shard-00001.safetensors"
    while not (shard.exists() and shard.stat().st_size > 1 << 20):
        pass
    os.kill(os.getpid(), 9)


def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    with pytest.raises(RankFailed, match=r"rank 1 died with exit code -9|rank 0 failed"):
        run_ranks(die_while_writing, 2, folder=tmp_path)
    assert (tmp_path / ".writing-00000002").is_dir(), "the kill came before or after the write"
    assert [(one.step, one.damage) for one in list_checkpoints(tmp_path, checksums=True)] == [
        (1, None)
    ]
    targets = {f"t{i}": torch.zeros(2, 1 << 20) for i in range(3)}
    assert load(latest_whole(tmp_path), targets) == {"step": 1}
    assert all(bool((target == 1).all()) for target in targets.values())
    save(tmp_path, step=2, tensors=targets, state={"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
