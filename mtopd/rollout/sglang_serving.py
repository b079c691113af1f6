"""What SGLang servers start with: a folder that says what they compute, and flags; weights come later.

``--load-format dummy``: there are no weights in the folder.  ``--skip-tokenizer-init``: token ids go
in and come out.  ``--incremental-streaming-output``: a chunk has the new tokens only, else its size
grows with the response.  ``--enable-deterministic-inference``: a draw follows from seed and position,
so that a response that is continued is the one it would have been.  Never
``--preferred-sampling-params``, which changes every request, nor
``--enable-custom-logit-processor``, which runs code that comes over the network.  A server trusts
whoever reaches it, and weights travel unencrypted: both need a network of their own.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch

from mtopd.families import model_facts
from mtopd.files import read_json, write_atomic
from mtopd.hf_checkpoint import hf_config_from_dict, load_hf_config
from mtopd.hf_export import config_values
from mtopd.rollout.sglang_wire import ALLOW_LONGER, RESERVED, server_flags


def write_serving_folder(folder: Path, source: Path, vocab_size: int, dtype: torch.dtype) -> bool:
    """Write config.json of the HF folder ``source`` alone, without weights and tokenizer; returns
    whether it is new.

    Its vocabulary ends with the tokenizer's last id: of the rows behind, which only fill a matrix
    up, no token is ever sampled.  Whole or not at all; one that stands there already is kept.
    """
    values = read_json(source / "config.json")
    values["vocab_size"] = vocab_size
    # An output layer of its own counts, also where the file says that it is tied.
    values["tie_word_embeddings"] = load_hf_config(source).tie_word_embeddings
    values.pop("auto_map", None)  # names code that is not there
    text = json.dumps(config_values(values, dtype), indent=2) + "\n"
    path = folder / "config.json"
    if path.is_file() and path.read_text() == text:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())
    return True


def start_command(folder: Path, *, context_length: int, seeded: bool) -> str:
    """The command that starts a server on ``folder``, for a shell in SGLang's environment.

    ``context_length``: tokens of the longest sample.  ``seeded``: draws follow from seed and position.
    """
    command = ["python", "-m", "sglang.launch_server", *server_flags(folder, seeded=seeded)]
    described = hf_config_from_dict(read_json(folder / "config.json"))
    if model_facts(described).max_positions < context_length + RESERVED:
        command += ["--context-length", str(context_length + RESERVED)]
        return f"{ALLOW_LONGER}=1 {shlex.join(command)}"
    return shlex.join(command)
