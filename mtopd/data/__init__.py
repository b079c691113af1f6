"""Prompts and supervised examples: where they come from, who teaches them, how answers are scored."""

from mtopd.data.environments import Turn, load_environment
from mtopd.data.prompt_file import load_prompt_file
from mtopd.data.readers import check_file, format_of
from mtopd.data.routes import Routes, route
from mtopd.data.sources import (
    Asking,
    PromptRow,
    PromptSource,
    load_reasoning_gym,
    with_fields,
)
from mtopd.data.tokenize import (
    Overlong,
    SupervisedExample,
    refuse_overlong,
    tokenize_answers,
    tokenize_prompts,
)
from mtopd.data.verifiers import CORRECT_SCORE, compared, open_dataset, verify

__all__ = [
    "CORRECT_SCORE",
    "Asking",
    "Overlong",
    "PromptRow",
    "PromptSource",
    "Routes",
    "SupervisedExample",
    "Turn",
    "check_file",
    "compared",
    "format_of",
    "load_environment",
    "load_prompt_file",
    "load_reasoning_gym",
    "open_dataset",
    "refuse_overlong",
    "route",
    "tokenize_answers",
    "tokenize_prompts",
    "verify",
    "with_fields",
]
