"""python benchmarks/official.py CHECKOUT MODEL TEXTS.json OUT

The SEAP authors' own calibration, by their own functions and with nothing else in the process: for every line of
standard input once over all texts, and then a line of standard output. The suite ``calibrate`` starts it.
"""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType


def main(checkout: str, model: str, texts: str, out: str) -> None:
    """Load the model by the authors' code, and calibrate for every line that comes in."""
    import torch

    torch.set_num_threads(1)
    if find_spec("seaborn") is None:  # which they import for pictures
        sys.modules["seaborn"] = ModuleType("seaborn")
    sys.path.insert(0, checkout)
    activations = import_module("src.activations")
    model_utils = import_module("src.model_utils")

    # On the CPU, as the suite measures both.
    loaded, tokenizer = model_utils.load_model_and_tokenizer(model, "cpu")
    manager = activations.ActivationHookManager()
    manager.register_activation_hooks(loaded)
    prompts = json.loads(Path(texts).read_text())

    for _ in sys.stdin:
        # Standard output is for the answers alone.
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            activations.save_activations(loaded, tokenizer, manager, prompts, ["all"] * len(prompts), output_root=out)
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
