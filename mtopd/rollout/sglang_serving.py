"""The folder that SGLang servers start with: what they compute is said there, weights come later.

SGLang 0.5.23, in an environment of its own:

    python -m sglang.launch_server --model-path FOLDER --load-format dummy --skip-tokenizer-init \\
        --incremental-streaming-output --enable-deterministic-inference --dtype DTYPE --host --port

``--load-format dummy``: there are no weights in the folder.  ``--skip-tokenizer-init``: token ids go
in and come out.  ``--incremental-streaming-output``: a chunk has the new tokens only, else its size
grows with the response.  ``--enable-deterministic-inference``: a draw follows from seed and position,
so that a response that is continued is the one it would have been.  ``--context-length`` and
``--max-total-tokens`` must allow some tokens more than the longest sample.  Never
``--preferred-sampling-params``, which changes every request, nor
``--enable-custom-logit-processor``, which runs code that comes over the network.  A server trusts
whoever reaches it, and weights travel unencrypted: both need a network of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mtopd.files import read_json, write_atomic
from mtopd.hf_export import config_values


def write_serving_folder(folder: Path, source: Path, vocab_size: int, dtype: torch.dtype) -> None:
    """Write config.json of the HF folder ``source`` alone, without weights and tokenizer.

    Its vocabulary ends with the tokenizer's last id: of the rows behind, which only fill a matrix
    up, no token is ever sampled.  Whole or not at all; one that stands there already is kept.
    """
    values = read_json(source / "config.json") | {"vocab_size": vocab_size}
    values.pop("auto_map", None)  # names code that is not there
    text = json.dumps(config_values(values, dtype), indent=2) + "\n"
    path = folder / "config.json"
    if not path.is_file() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
