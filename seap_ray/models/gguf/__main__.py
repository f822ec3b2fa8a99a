"""The command ``python -m seap_ray.models.gguf FOLDER FILE``: the checkpoint in a folder as a GGUF file."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from seap_ray.config.schema import GgufType
from seap_ray.errors import SeapError
from seap_ray.models.gguf.writer import GgufExport
from seap_ray.storage.paths import storage_path


def main(arguments: list[str]) -> int:
    """Write the file; return the exit code, after one line for an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m seap_ray.models.gguf", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint: dense, or an expert of a run")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--type", choices=get_args(GgufType), default="Q8_0", help="type of the matrices")
    options = parser.parse_args(arguments)

    try:
        export = GgufExport.of(options.folder, options.type, options.folder.absolute().name)
        for warning in export.vocabulary.warnings:
            print(f"warning: {warning}")
        export.write(storage_path(options.file))
    except SeapError as error:
        print(error, file=sys.stderr)
        return error.exit_code

    n_bytes = options.file.stat().st_size
    print(f"{options.file}: {export.layout.name}, {len(export.tensors)} tensors, {n_bytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
