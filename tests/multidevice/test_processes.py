"""Batches on a mesh of two processes with four devices each, as on a pod, behind a proxy."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.data.prepared import write_data

ROOT = Path(__file__).parents[2]
PROCESS = """
import dataclasses, json, sys
import jax, numpy as np

process, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
from emollama_jax.distributed import Group, process_group

group = process_group(Group(address, 2, process))
group.__enter__()

from emollama_jax.config import MeshConfig
from emollama_jax.data.batch_shards import process_shard
from emollama_jax.data.pipeline import onto_devices, train_dataset
from emollama_jax.sharding import make_mesh
from tests.data.prepared import TOKENIZER, tiny_config

config = tiny_config({"train": (f"{folder}:train",), "batch_rows": 8})
found = {}
for sizes in ((2, 4, 1), (1, 2, 4), (1, 1, 8)):  # rows split over both processes; over tensor alone: all rows on both
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)))
    index, count = process_shard(config, mesh)
    dataset = train_dataset(config, TOKENIZER, shard_index=index, num_shards=count)
    local, placed = iter(dataset), iter(onto_devices(dataset, config, mesh))
    clips = []
    for _ in range(3):
        rows, batch = next(local), next(placed)
        assert batch.tokens.shape == (8, 256) and rows.tokens.shape == (8 // count, 256)
        for array, local_array in zip(jax.tree.leaves(batch), jax.tree.leaves(rows), strict=True):
            offset = index * (8 // count)
            for shard in array.addressable_shards:
                here = slice(*shard.index[0].indices(8)[:2])
                np.testing.assert_array_equal(shard.data, local_array[here.start - offset : here.stop - offset])
        total = jax.jit(lambda mask: mask.sum())(batch.clip_mask)  # over both processes
        clips += rows.clip[rows.clip_mask].tolist()
    found["x".join(map(str, sizes))] = {"shard": (index, count), "clips": clips, "last": int(total)}
    placed.close(); local.close()
print("FOUND", json.dumps(found))
"""


def test_two_processes_share_every_batch(tmp_path):
    folder = write_data(tmp_path / "data", {"train": 200})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "http_proxy": "http://10.255.255.1:3128",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    command = lambda i: [sys.executable, "-c", PROCESS, str(i), address, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command(i), env=environment, **pipes) for i in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    one, two = (json.loads(output.split("FOUND ")[1].splitlines()[0]) for output in outputs)
    for sizes in ("2x4x1", "1x2x4"):
        assert (one[sizes]["shard"], two[sizes]["shard"]) == ([0, 2], [1, 2])
        assert not set(one[sizes]["clips"]) & set(two[sizes]["clips"])  # of one epoch
        assert one[sizes]["last"] == two[sizes]["last"] > 8
    assert one["1x1x8"] == two["1x1x8"]
    assert one["1x1x8"]["shard"] == [0, 1]
