"""GGUF files in a bucket: made of a checkpoint that lies there, and put there whole."""

import gguf

from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.gguf_files import write_gguf, write_preset
from seap_ray.storage.digests import digest_of_file
from seap_ray.storage.files import stage, write_json
from seap_ray.storage.run import Run


def test_a_checkpoint_in_a_bucket_becomes_a_file_beside_it(bucket):
    run = Run(bucket / "run")
    folder = run.expert(0.2, "logic")
    for file in Checkpoint.open("demo").folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    path = folder / "model-Q4_0.gguf"
    digest = write_gguf(folder, "Q4_0", "demo logic 0.20", path)
    assert digest_of_file(path) == digest
    reader = gguf.GGUFReader(stage(path))
    assert reader.fields["general.name"].contents() == "demo logic 0.20" and len(reader.tensors) == 75

    # Another attempt at the same checkpoint finds the file.
    modified = path.stat().st_mtime_ns
    assert write_gguf(folder, "Q4_0", "demo logic 0.20", path) == digest and path.stat().st_mtime_ns == modified

    write_json(folder / "seap.json", {"gguf": {"file": path.name}})
    write_preset(run)
    preset = (run.root / "experts" / "llama-server.ini").read_text()
    assert preset.endswith("[0.20/logic]\nmodel = 0.20/logic/model-Q4_0.gguf\n")
