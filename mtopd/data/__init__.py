"""Prompts and supervised examples: where they come from, who teaches them, how answers are scored."""

from mtopd.data.configured import check_sources, load_source, source_identity
from mtopd.data.environments import Turn
from mtopd.data.prompt_file import load_prompt_file
from mtopd.data.routes import Routes, route
from mtopd.data.sources import Asking, PromptSource, load_reasoning_gym
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
    "PromptSource",
    "Routes",
    "SupervisedExample",
    "Turn",
    "check_sources",
    "compared",
    "load_prompt_file",
    "load_reasoning_gym",
    "load_source",
    "open_dataset",
    "refuse_overlong",
    "route",
    "source_identity",
    "tokenize_answers",
    "tokenize_prompts",
    "verify",
]
